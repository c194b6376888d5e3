"""What a benchmark's figures mean, and that each runs."""

import gc
import json
import weakref

import pytest
from launch import run
from torch.nn.attention import SDPBackend, sdpa_kernel

from famt.jobs.benchmark import BENCHMARKS, parse
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.measure import seconds
from famt.jobs.benchmarks.step import Step, count_flops
from famt.jobs.benchmarks.training import BenchmarkOptions, open_run, open_steps, take_steps

TINY = {"model": "vit_nano", "batch_size": 8, "threads": 1}


def test_several_benchmarks_are_measured_with_one_command():
    several = parse(["loader", "--threads", "1", "step", "--model", "vit_nano", "loader"])
    assert several == [Loader(threads=1), Step(model="vit_nano"), Loader()]


def test_rivals_take_turns_and_the_first_round_does_not_count():
    turns = []
    taken = seconds({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
    assert turns == ["a", "b"] * 3
    assert [len(each) for each in taken.values()] == [2, 2]


@pytest.mark.parametrize("recipe", ["mae", "famt --frequency.source cached"])
def test_a_run_that_ended_keeps_no_memory(recipe, scored):
    gc.collect()
    gc.disable()  # a cycle would wait for the collector, its memory counted to the next run
    try:
        options = f"--recipe {recipe} --spec.grid 7"
        config = BenchmarkOptions(**TINY).config(scored.shards, scored.cache.url, options)
        with open_run(config) as run:
            take_steps(run, 1)
            kept = [weakref.ref(run), weakref.ref(run.model)]
        del run
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


def test_the_flops_of_a_step_are_those_of_its_matrix_products_attention_among_them(scored):
    config = BenchmarkOptions(**TINY).config(scored.shards, scored.cache.url, "--recipe mae")
    with open_steps(config) as steps:
        found = count_flops(steps)
        with sdpa_kernel(SDPBackend.MATH):  # attention as products, which torch counts by itself
            products = count_flops(steps)
    # By flash attention the backward pass has the scores' product once more.
    assert products < found < 1.05 * products


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "lines"),
    [
        ("precompute", {"rounds": 1, "images": 10}, 2),
        (
            "loader",
            {"rounds": 1, "images": 20, "batch_size": 4, "threads": 1, "resident": True},
            5,
        ),
        ("step", {**TINY, "rounds": 1}, 5),
        ("attention", {**TINY, "rounds": 1}, 7),
        ("refresh", {**TINY, "rounds": 1}, 2),
        ("runs", {**TINY, "steps": 2}, 3),
    ],
)
def test_every_line_holds_a_figure_against_a_bound(scored, name, options, lines):
    printed = list(BENCHMARKS[name](shards=scored.shards, **options).run())
    _check(printed, name, lines)
    if name == "step":
        famt, own, all_predicted, uniform, simmim = (line["flop_ratio"] for line in printed)
        assert uniform < famt < all_predicted < own < 1
        assert simmim < 1


@pytest.mark.slow
def test_the_scale_of_many_shards_is_held_against_its_bounds():
    # In a process of its own: what it tells of memory is that of all the process.
    options = ["--shards", "3", "--images-per-shard", "2000"]
    done = run("-m", "famt.jobs.benchmark", "scale", *options)
    _check([json.loads(line) for line in done.stdout.splitlines()], "scale", 2)


def _check(printed, name, lines):
    assert len(printed) == lines
    for line in printed:
        assert line["benchmark"] == name
        assert line["figure"] > 0
        assert line["bound"] > 0
        assert line["unit"]
        assert line["against"]
        assert json.loads(json.dumps(line)) == line
