import dataclasses

import pytest

from famt.jobs.costs import StepCost, measured, step_key
from famt.train.command_line import parse
from famt.train.config import OptimiserConfig, Pretrain
from famt.train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig


def options(*arguments: str) -> Pretrain:
    inputs = ["--shards", "a.tar", "--cache", "scores", "--out", "run"]
    return parse(["--recipe", "famt", *inputs, *arguments], None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--frequency.source", "cached"], 0.5),
        # token frequency is refreshed at 4 and 8
        (["--refresh.every", "4"], 0.5 + 2 * 0.3 / 10),
        # refreshed at 4, where the plain epochs end, at 7, not at 10
        (["--recipe", "famt-paper", "--plain-epochs", "4", "--refresh.every", "3"], (4 + 3) / 10
         + 2 * 0.3 / 10),
        # plain until the first refresh, at 4, and one at 8
        (["--recipe", "famt-paper", "--refresh.every", "4"], (4 + 3) / 10 + 2 * 0.3 / 10),
        (["--refresh.every", "4", "--refresh.pin", "run-1/7"], 0.5),
    ],
)  # fmt: skip
def test_a_runs_cost_is_that_of_its_epochs_and_refreshes(arguments, expected):
    cost = StepCost(weighed=0.5, plain=1.0, refresh=0.3)
    assert cost.of(options(*arguments, "--epochs", "10")) == pytest.approx(expected)


@pytest.fixture
def runs(scored, tmp_path):
    base = Pretrain(
        shards=scored.shards, cache=scored.cache.url, out=tmp_path, model="vit_nano", batch_size=8,
        spec=scored.spec, device="cpu", threads=1, refresh=RefreshConfig(every=1),
    )  # fmt: skip
    tiny = {"image_size": 8, "patch_size": 4, "decoder_depth": 1}
    amt = AttentionConfig("refreshed", kind="cls_attention")
    return {
        "famt": base,
        "small": dataclasses.replace(
            base, **tiny, plain_epochs=1, frequency=FrequencyConfig("off"), attention=amt
        ),
    }


@pytest.mark.slow
def test_costs_are_shares_of_a_step_of_the_reference(runs):
    assert measured(runs["famt"], runs["famt"]).weighed == 1
    small = measured(runs["small"], runs["famt"])
    assert 0 < small.weighed < 1
    assert 0 < small.plain < 1
    assert small.refresh > 0


def test_rates_seeds_and_epochs_do_not_change_what_a_step_costs(runs):
    others = {"epochs": 3, "seed": 1, "optimiser": OptimiserConfig(base_learning_rate=1e-3)}
    keys = {name: step_key(run) for name, run in runs.items()}
    assert keys == {
        name: step_key(dataclasses.replace(run, **others)) for name, run in runs.items()
    }
    assert keys["famt"] != keys["small"]
