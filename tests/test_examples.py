"""The example scripts run, take few changed lines, and leave thrown patches out."""

import importlib
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
LOOPS = {
    "timm_loop": lambda module: module.Model(),
    "lightly_mae": lambda module: module.Model(),
    "transformers_mae": lambda module: _hugging_face(module.build()),
}


def _hugging_face(model):
    return lambda images, weights: model(pixel_values=images, noise=weights).loss


@pytest.fixture
def load(monkeypatch):
    """Import an example as a script would be run: its folder comes first."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("name", LOOPS)
def test_an_example_trains_and_ten_lines_are_famts(load, name, capsys):
    marked = re.findall(r"# FAMT$", (EXAMPLES / f"{name}.py").read_text(), re.M)
    assert 0 < len(marked) <= 10
    load(name).main(steps=2, batch_size=4)
    losses = [float(each) for each in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 2


@pytest.mark.parametrize(("name", "build"), LOOPS.items())
@torch.no_grad()
def test_in_an_example_thrown_patches_do_not_matter_and_others_do(load, name, build):
    torch.manual_seed(0)
    module = load(name)
    loss = build(module)
    weights = torch.full((2, 64), 1.0)
    weights[:, :28], weights[:, 28:54] = 1e20, 1e10  # masked, thrown; the rest is seen
    images = torch.randn(2, 3, 64, 64)

    def changed(patch):
        other, (row, column) = images.clone(), divmod(patch, 8)
        other[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] *= -1
        return loss(other, weights)

    plain = loss(images, weights)
    torch.testing.assert_close(changed(40), plain)
    assert (changed(5) - plain).abs() > 1e-5
    assert (changed(60) - plain).abs() > 1e-5


def test_the_data_plane_feeds_a_loop_of_ones_own(load, scored, capsys):
    load("data_loop").main(f"{scored.folder}/*.tar", scored.cache.url, 1, batch_size=8, grid=7)
    assert len(re.findall(r"loss [\d.]+", capsys.readouterr().out)) == 3


def test_every_block_of_the_page_on_parts_runs(scored, tmp_path, monkeypatch):
    (tmp_path / "scores").symlink_to(scored.cache.url)
    monkeypatch.chdir(tmp_path)
    page = (EXAMPLES.parent / "parts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["crops"].shape == (8, 96, 96, 3)
    assert names["on_crops"].shape == (4, 12, 12)
