import re
from importlib.metadata import EntryPoint

import pytest
import torch

from famt.pipeline.errors import UserError
from famt.train.signals.config import AttentionConfig, FrequencyConfig, HardnessConfig
from famt.train.signals.patch_weights import weigh_crops


def _weigh(run, crops):
    return weigh_crops(run.config, run.signals, crops, epoch=0, step=0, progress=0.0)


def test_the_weight_is_the_product_of_relative_signals_to_their_powers(begin):
    run = begin(
        frequency=FrequencyConfig("cached", cached_exponent=0.5),
        attention=AttentionConfig("live", exponent=2.0),
    )
    crops = next(iter(run.loader))
    frequency, attention = (each.read(crops, 0) for each in run.signals)
    found = _weigh(run, crops).weights
    for b in range(8):
        for n in range(64):
            relative = frequency[b, n] / frequency[b].mean(), attention[b, n] / attention[b].mean()
            expected = float(relative[0] ** 0.5 * relative[1] ** 2)
            assert found[b, n].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_without_signals_weights_are_uniform(begin):
    run = begin(frequency=FrequencyConfig("off"), attention=AttentionConfig("off"))
    assert torch.equal(_weigh(run, next(iter(run.loader))).weights, torch.ones(8, 64))


def test_a_signal_that_has_nothing_to_say_yet_leaves_the_weights_to_the_others(begin):
    run = begin(frequency=FrequencyConfig("refreshed"))
    crops = next(iter(run.loader))
    assert list(_weigh(run, crops).scores) == ["attention"]
    assert run.prepare(crops, 0).split.masked.shape == (8, 28)
    run.signals = run.signals[:1]
    assert run.prepare(crops, 0).split.masked.shape == (8, 48)  # a plain MAE's
    run.close(finished=True)


@pytest.mark.parametrize(
    ("slot", "error"),
    [
        ({"hardness": HardnessConfig("what")}, "hardness.source what: there are off, errors."),
        ({"hardness": HardnessConfig("refreshed")}, "source refreshed: there are off, errors."),
        ({"attention": AttentionConfig("cached")}, "attention.source cached: there are off, live"),
        ({"frequency": FrequencyConfig("rolling")}, "source rolling: there are off, cached"),
    ],
)
def test_a_source_that_its_slot_does_not_know_names_those_it_does(begin, slot, error):
    with pytest.raises(UserError, match=re.escape(error)):
        begin(**slot)


def test_a_packages_own_signal_weighs_patches(begin, monkeypatch):
    """The example of docs/custom-signals.md."""
    added = EntryPoint("centre", "centre_signal:Centre", "famt.signals")
    monkeypatch.syspath_prepend("docs/centre_signal")
    monkeypatch.setattr("famt.pipeline.plugins._installed", lambda group: {"centre": added})
    run = begin(frequency=FrequencyConfig("centre", exponent=1.0))
    crops = next(iter(run.loader))
    (scores, exponent) = _weigh(run, crops).scores["frequency"]
    assert exponent == 1.0
    assert run.signals[0].scalars()["frequency_crops_read"] == 8
    cells = scores.view(8, 8, 8)
    for b in range(8):
        top, left, height, width = crops.windows[b].tolist()
        flipped = bool(crops.flips[b])
        for y in range(8):
            for x in range(8):
                across = 7 - x if flipped else x
                middle = top + (y + 0.5) / 8 * height - 0.5, left + (across + 0.5) / 8 * width
                distance = middle[0] ** 2 + (middle[1] - 0.5) ** 2
                expected = pytest.approx(2.718281828 ** (-distance / 0.08), rel=1e-4)
                assert cells[b, y, x].item() == expected
