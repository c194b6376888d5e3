import dataclasses
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from famt.frequency import pixel_frequency
from famt.pipeline import plugins
from famt.pipeline.errors import UserError
from famt.pipeline.scores import ModelScoreSpec, ScoreSpec
from famt.pipeline.scoring.model_scores import model_maps


def test_equal_specs_share_an_id_and_any_difference_parts_them():
    assert ScoreSpec().id == ScoreSpec().id
    changes = {"kind": "lowpass", "grid": 7, "pixels_per_cell": 8, "band": (0.0, 4.0)}
    spec = ScoreSpec("bandpass")
    ids = {dataclasses.replace(spec, **{k: v}).id for k, v in changes.items()}
    assert len(ids | {spec.id}) == len(changes) + 1
    assert set(changes) == {field.name for field in dataclasses.fields(ScoreSpec)}


def test_a_spec_scores_bytes_as_the_method_scores_floats():
    spec = ScoreSpec(kind="bandpass", grid=4, band=(1.0, 3.0))
    images = torch.randint(0, 256, (2, spec.size, spec.size, 3), dtype=torch.uint8)
    expected = pixel_frequency(images.permute(0, 3, 1, 2) / 255, 4, "bandpass", (1.0, 3.0))
    torch.testing.assert_close(spec.score(images), expected)


PACKAGE = """
import torch

def rows(images, grid):
    return torch.arange(1.0, grid + 1).view(1, grid, 1).expand(len(images), grid, grid)

def nonsense(images, grid):
    return torch.full((len(images), grid, grid), float("nan"))

def first_channel(encoder, images):
    return images[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).abs().mean((-1, -2)).flatten(1)
"""
ENTRY_POINTS = """
[famt.scores]
rows = famt_extra:rows
nonsense = famt_extra:nonsense
hypercomplex_fourier = famt_extra:nonsense

[famt.model_scores]
first_channel = famt_extra:first_channel
"""


@pytest.fixture
def extra(tmp_path, monkeypatch):
    """An installed package that brings kinds of its own; returns how to change its version."""

    def install(version):
        for old in tmp_path.glob("famt_extra-*"):
            shutil.rmtree(old)
        info = tmp_path / f"famt_extra-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: famt-extra\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(ENTRY_POINTS)
        (tmp_path / "famt_extra.py").write_text(PACKAGE)
        plugins._installed.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    install("1.0")
    yield install
    plugins._installed.cache_clear()


def test_a_package_adds_a_kind_by_its_name(extra):
    spec = ScoreSpec(kind="rows", grid=4)
    images = torch.zeros(2, spec.size, spec.size, 3, dtype=torch.uint8)
    expected = (torch.arange(1.0, 5) / 2.5).view(1, 4, 1).expand(2, 4, 4)
    torch.testing.assert_close(spec.score(images), expected)
    assert spec.id.startswith("rows-")
    assert ScoreSpec.from_description(spec.describe()) == spec


def test_another_version_of_the_package_is_another_score(extra):
    spec = ScoreSpec(kind="rows", grid=4)
    first, described = spec.id, spec.describe()
    extra("1.1")
    assert ScoreSpec(kind="rows", grid=4).id != first
    assert ScoreSpec.from_description(described) is None


def test_a_package_can_not_replace_a_kind_of_ours(extra):
    spec = ScoreSpec(grid=4)
    images = torch.randint(0, 256, (1, spec.size, spec.size, 3), dtype=torch.uint8)
    assert spec.score(images).isfinite().all()


def test_a_package_that_gives_no_numbers_is_refused_by_name(extra):
    spec = ScoreSpec(kind="nonsense", grid=4)
    with pytest.raises(UserError, match="scores of kind 'nonsense' must be finite"):
        spec.score(torch.zeros(1, spec.size, spec.size, 3, dtype=torch.uint8))


def test_a_package_adds_a_score_of_the_model(extra):
    spec = ModelScoreSpec("first_channel", 8, 32, "0" * 32)
    images = torch.rand(2, 3, 32, 32)
    cells = torch.nn.functional.avg_pool2d(images[:, :1], 4).squeeze(1)
    expected = cells / cells.mean((1, 2), keepdim=True)
    torch.testing.assert_close(model_maps([spec], None, images)[0], expected)
    assert spec.describe()["code_version"] == "famt-extra 1.0"


def test_an_unknown_kind_names_all_there_are(extra):
    with pytest.raises(UserError, match=r"no score of kind 'colums'.*spectral_residual.* rows"):
        _ = ScoreSpec(kind="colums").id


def test_the_packaged_example_gives_a_map_that_finds_a_bright_square():
    pytest.importorskip("cv2.saliency")
    root = Path(__file__).parents[2] / "docs" / "opencv_saliency"
    module = runpy.run_path(str(root / "famt_opencv_saliency.py"))
    images = torch.full((1, 112, 112, 3), 40, dtype=torch.uint8)
    images[:, 32:64, 48:80] = 230
    maps = module["saliency"](images, 7)
    assert maps.shape == (1, 7, 7)
    inside = maps[0, 2:4, 3:5].mean()
    assert inside > 2 * maps.mean()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"grid": 0}, "--grid 0 must be at least 1"),
        ({"grid": 1}, "grid must be at least 2"),
        ({"pixels_per_cell": 0}, "--pixels-per-cell .* must be at least 1"),
        ({"grid": 100_000}, "at most 1024 px"),
        ({"kind": "lowpass", "band": (8.0, 2.0)}, "0 <= low < high"),
        ({"kind": "lowpass", "band": (-1.0, 2.0)}, "--band -1.0 must be at least 0"),
        ({"kind": "lowpass", "band": (float("nan"), 2.0)}, "--band nan"),
        ({"kind": "lowpass", "band": (1.0, float("nan"))}, "--band nan"),
        ({"kind": "spectral_residual", "band": (1.0, 2.0)}, "takes no band"),
        ({"kind": "of_a_package", "band": (1.0, 2.0)}, "takes none"),
        ({"kind": "contnt"}, "no score of kind 'contnt': there are hypercomplex_fourier"),
        ({"kind": "of_a_package", "grid": 0}, "--grid 0 must be at least 1"),
    ],
)
def test_a_spec_refuses_what_can_score_no_image(options, reason):
    with pytest.raises(UserError, match=reason):
        ScoreSpec(**options)
    assert ScoreSpec.from_description({**ScoreSpec().describe(), **options}) is None
