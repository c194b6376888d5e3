"""The packages of docs/ that bring a method of the literature: found by their entry points."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import log_points
from samples import photo

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.patches import normalise_images
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.scoring.generation import write_generation
from famt.pipeline.scoring.model_scores import model_scores
from famt.train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig

DOCS = Path(__file__).parents[3] / "docs"


def _installed(folder: str, monkeypatch) -> dict[str, dict[str, EntryPoint]]:
    """group -> name -> entry point, as the package's pyproject.toml states them."""
    monkeypatch.syspath_prepend(DOCS / folder)
    project = tomllib.loads((DOCS / folder / "pyproject.toml").read_text())["project"]
    return {
        group: {name: EntryPoint(name, value, group) for name, value in entries.items()}
        for group, entries in project["entry-points"].items()
    }


@pytest.fixture
def salience(monkeypatch):
    groups = _installed("token_salience", monkeypatch)
    monkeypatch.setattr("famt.pipeline.plugins._installed", lambda group: groups.get(group, {}))


def test_token_salience_is_what_all_patches_pay_to_one_in_log_weights(salience):
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    images = normalise_images(torch.from_numpy(np.stack([photo(0, 32, 32), photo(1, 32, 32)])))
    found = model_scores(["token_salience"], encoder, images)["token_salience"].numpy()
    with torch.no_grad():
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    noise = np.random.default_rng(0)
    spread = noise.uniform(0, 0.5, 4_000_000).std() / noise.gumbel(size=4_000_000).std()
    for weighed, x in zip(found, tokens.double().numpy(), strict=True):
        received = np.zeros(len(x))
        for one in x:
            paid = np.exp([one @ other - max(x @ one) for other in x])
            received += paid / paid.sum()
        expected = (received - received.min()) / np.ptp(received)
        np.testing.assert_allclose(np.log(weighed) * spread, expected, atol=2e-3)


def test_patches_that_are_all_alike_are_equally_salient(salience):
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    torch.nn.init.zeros_(encoder.pos_embed)
    found = model_scores(["token_salience"], encoder, torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(found["token_salience"], torch.ones(1, 64))


def test_a_run_masks_by_token_salience(salience, train):
    attention = AttentionConfig("live", kind="token_salience")
    out = train(frequency=FrequencyConfig("off"), attention=attention)
    losses = [point["loss"] for point in log_points(out)]
    assert len(losses) == 9
    assert np.isfinite(losses).all()


def test_green_noise_weighs_groups_of_patches_anew_at_every_step(monkeypatch, begin, train):
    groups = _installed("green_noise", monkeypatch)
    monkeypatch.setattr("famt.pipeline.plugins._installed", lambda group: groups[group])
    slots = {"frequency": FrequencyConfig("green-noise"), "attention": AttentionConfig("off")}
    run = begin(**slots)
    crops = next(iter(run.loader))
    (signal,) = run.signals
    maps = torch.stack([signal.read(crops, step).log().view(8, 8, 8) for step in range(99)])
    torch.testing.assert_close(signal.read(crops, 3).log().view(8, 8, 8), maps[3])
    assert torch.corrcoef(maps.flatten(1)[:2])[0, 1].abs() < 0.5

    def across(distance):
        pairs = maps[..., :-distance].flatten(), maps[..., distance:].flatten()
        return torch.corrcoef(torch.stack(pairs))[0, 1].item()

    assert across(1) > 0.05  # neighbours go together
    assert across(3) < -0.02  # and apart from the next group
    assert len(log_points(train(**slots))) == 9


def test_controls_of_the_paper_read_the_maps_corner_and_another_images_map(
    monkeypatch, begin, tmp_path
):
    groups = _installed("paper_controls", monkeypatch)
    monkeypatch.setattr("famt.pipeline.plugins._installed", lambda group: groups[group])
    samples = begin().samples
    own = np.arange(2, len(samples) + 2, dtype=np.float16)[:, None, None]
    corner = np.ones((len(samples), 8, 8), np.float16)
    corner[:, :3, :3] = own
    maps = {"attention": corner, "token_frequency": np.broadcast_to(own, corner.shape)}
    path = tmp_path / "generation-00000003.zip"
    specs = {ModelScoreSpec(kind, 8, 32, "any"): each for kind, each in maps.items()}
    write_generation(path, "another-run", samples.digest, specs)
    run = begin(
        frequency=FrequencyConfig("refreshed-top-left", kind="attention"),
        attention=AttentionConfig("refreshed-of-others", kind="token_frequency"),
        refresh=RefreshConfig(pin=path),
    )
    seen = {}
    for crops in run.loader:
        top_left, of_others = (signal.read(crops, 0) for signal in run.signals)
        expected = torch.from_numpy(own[crops.rows, 0].astype(np.float32)).expand(-1, 64)
        torch.testing.assert_close(top_left, expected)
        for row, values in zip(crops.rows.tolist(), of_others, strict=True):
            torch.testing.assert_close(values, values[:1].expand(64))
            seen[row] = round(values[0].item()) - 2
    assert all(row != other for row, other in seen.items())
    assert len({*seen.values()}) == len(seen) == 24
