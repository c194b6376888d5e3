"""What a benchmark's figures mean, and that each runs."""

import json
import subprocess
import sys

import pytest
import scipy.stats
import torch
from launch import program_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from famt.jobs.benchmark import BENCHMARKS, parse
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.measure import rank_correlations, seconds
from famt.jobs.benchmarks.step import Step, _Rival


def test_several_benchmarks_are_measured_with_one_command():
    several = parse(["loader", "--threads", "1", "step", "--model", "vit_nano", "loader"])
    assert several == [Loader(threads=1), Step("vit_nano"), Loader()]


def test_rivals_take_turns_and_the_first_round_does_not_count():
    turns = []
    taken = seconds({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
    assert turns == ["a", "b"] * 3
    assert [len(each) for each in taken.values()] == [2, 2]


def test_rank_correlations_are_spearmans():
    a, b = torch.rand(2, 3, 49)
    expected = [float(scipy.stats.spearmanr(x, y).statistic) for x, y in zip(a, b, strict=True)]
    assert rank_correlations(a, b) == pytest.approx(expected, abs=1e-5)


def test_the_flops_of_a_step_are_those_of_its_matrix_products_attention_among_them():
    rival = _Rival("mae self", Step("vit_nano", batch_size=2, device="cpu"))
    found = rival.flops()
    with sdpa_kernel(SDPBackend.MATH):  # attention as products, which torch counts by itself
        products = rival.flops()
    # By flash attention the backward pass has the scores' product once more.
    assert products < found < 1.05 * products


@pytest.mark.slow
def test_a_peak_is_what_was_held_at_once_while_working():
    # In a process of its own, as the benchmark measures: here other tests' memory comes and goes.
    command = [sys.executable, program_file("peak_of_memory")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(64, abs=16)


@pytest.mark.slow
def test_a_step_is_compared_in_time_and_memory_under_every_method():
    lines = list(Step("vit_nano", batch_size=64, rounds=1).run())
    assert [line["benchmark"] for line in lines] == ["step"] * 8
    for line in lines:
        assert line["figure"] > 0
        assert line["bound"] > 0
    uniform, own, cross, simmim = lines[:4]
    assert uniform["flop_ratio"] < cross["flop_ratio"] < own["flop_ratio"] < 1
    assert simmim["flop_ratio"] == pytest.approx(0.74, abs=0.03)  # 1 - 26 % thrown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "lines"),
    [
        ("precompute", {"rounds": 1, "images": 10}, 6),
        ("loader", {"rounds": 1, "images": 20, "batch_size": 4, "threads": 1}, 4),
        ("attention", {"model": "vit_nano", "batch_size": 8, "rounds": 1, "threads": 1}, 11),
        ("refresh", {"model": "vit_nano", "step_batch_size": 4, "rounds": 1, "threads": 1}, 2),
    ],
)
def test_every_line_holds_a_figure_against_a_bound(scored, name, options, lines):
    printed = list(BENCHMARKS[name](shards=scored.shards, **options).run())
    _check(printed, name, lines)


@pytest.mark.slow
def test_the_scale_of_many_shards_is_held_against_its_bounds():
    # In a process of its own: what it tells of memory is that of all the process.
    options = ["--shards", "3", "--images-per-shard", "2000"]
    command = [sys.executable, "-m", "famt.jobs.benchmark", "scale", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _check([json.loads(line) for line in done.stdout.splitlines()], "scale", 3)


def _check(printed, name, lines):
    assert len(printed) == lines
    for line in printed:
        assert line["benchmark"] == name
        assert line["figure"] > 0
        assert line["bound"] > 0
        assert line["unit"]
        assert line["against"]
        assert json.loads(json.dumps(line)) == line
