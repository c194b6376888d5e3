import re

import pytest

from famt.pipeline.errors import UserError
from famt.train.command_line import parse
from famt.train.signals.cached import Cached
from famt.train.signals.config import HardnessConfig

GIVEN = ["--recipe", "famt", "--shards", "a", "--cache", "c", "--out", "o", "--epochs", "100"]


def _parse(options):
    return parse([*GIVEN, *options.split()], None)


@pytest.mark.parametrize(
    ("options", "idle", "reason"),
    [
        ("--attention.source live --attention.image-size 64", "attention.image-size", "rolling"),
        ("--attention.source off --attention.exponent 2", "attention.exponent", "source is off"),
        ("--method simmim --decoder-width 128", "decoder-width", "simmim has no decoder"),
        ("--join.predicted-share 1 --join.predicted spread", "join.predicted", "all are predicted"),
        ("--refresh.every 120", "refresh.every", "no score is refreshed"),
        ("--frequency.source cached --refresh.wait", "refresh.wait", "no score is refreshed"),
        ("--frequency.source refreshed --spec.grid 7", "spec.grid", "no score is cached"),
        ("--monitor-epochs 3", "monitor-epochs", "nothing is monitored"),
    ],
)
def test_an_option_that_changes_nothing_is_told_with_the_reason(options, idle, reason):
    (told,) = [each for each in _parse(options).without_effect() if each.startswith(f"--{idle} (")]
    assert reason in told


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--attention.image-size 64",
        "--decoder-width 128",
        "--join.predicted-share 0.5 --join.predicted spread",
        "--join.visible lightest --join.thrown lightest --join.loss-exponent 1 --plain-epochs 99",
        "--refresh.every 90 --refresh.wait",
        "--epochs 30 --plain-epochs 20",
        "--frequency.exponent 2 --spec.grid 7",
        "--monitor b --monitor-epochs 3",
    ],
)
def test_options_that_count_are_not_told(options):
    assert _parse(options).without_effect() == []


def test_simmim_takes_a_recipe_with_a_decoder_that_it_has_not():
    arguments = ["--recipe", "uniform", *GIVEN[2:], "--method", "simmim"]
    config = parse(arguments, None)
    assert config.sizes.decoder == "self"
    assert any(re.match("--decoder .*no decoder", each) for each in config.without_effect())


@pytest.mark.parametrize("options", ["--join.mask-ratio 0.7", "--join.mask-ratio 0.001"])
def test_ratios_that_leave_nothing_to_see_or_mask_are_refused(options):
    with pytest.raises(
        UserError,
        match=f"-ratio, --join.throw-ratio: .*mask ratio {options.split()[1]} and throw ratio 0.4",
    ):
        _parse(options)


def test_a_score_is_needed_and_its_options_count_whichever_slot_reads_the_cache(monkeypatch):
    given = _parse("--frequency.source off --spec.grid 7")
    assert given.cached_score is None
    assert [told for told in given.without_effect() if told.startswith("--spec.grid (")]
    monkeypatch.setattr(HardnessConfig, "signal", property(lambda slot: Cached))
    given = _parse("--frequency.source off --spec.grid 7 --hardness.source of_a_package")
    assert given.cached_score == given.spec
    assert not [told for told in given.without_effect() if told.startswith("--spec.grid (")]
