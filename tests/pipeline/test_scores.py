import dataclasses

import pytest
import torch

from famt.frequency import pixel_frequency
from pipeline.scores import ScoreSpec


def test_equal_specs_share_an_id_and_any_difference_parts_them():
    assert ScoreSpec().id == ScoreSpec().id
    changes = {"kind": "lowpass", "grid": 7, "pixels_per_cell": 8, "band": (0.0, 4.0)}
    ids = {dataclasses.replace(ScoreSpec(), **{k: v}).id for k, v in changes.items()}
    assert len(ids | {ScoreSpec().id}) == len(changes) + 1
    assert set(changes) == {field.name for field in dataclasses.fields(ScoreSpec)}


def test_an_id_says_its_kind():
    assert ScoreSpec(kind="highpass").id.startswith("highpass-")


def test_a_spec_scores_bytes_as_the_method_scores_floats():
    spec = ScoreSpec(kind="bandpass", grid=4, band=(1.0, 3.0))
    images = torch.randint(0, 256, (2, spec.size, spec.size, 3), dtype=torch.uint8)
    expected = pixel_frequency(images.permute(0, 3, 1, 2) / 255, 4, "bandpass", (1.0, 3.0))
    torch.testing.assert_close(spec.score(images), expected)


def test_a_band_makes_no_sense_upside_down():
    spec = ScoreSpec(band=(5.0, 1.0))
    with pytest.raises(ValueError, match="low < high"):
        spec.score(torch.zeros(1, spec.size, spec.size, 3, dtype=torch.uint8))
