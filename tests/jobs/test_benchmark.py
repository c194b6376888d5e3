"""What a benchmark's figures mean, and that each runs."""

import pytest
import torch

from jobs.benchmark import parse
from jobs.benchmarks.loader import Loader
from jobs.benchmarks.step import Step, _peak_of_process


def test_several_benchmarks_are_measured_with_one_command():
    several = parse(["loader", "--threads", "1", "step", "--model", "vit_nano_32", "loader"])
    assert several == [Loader(threads=1), Step("vit_nano_32"), Loader()]


def test_a_peak_is_what_was_held_at_once_while_working():
    def work():
        for _ in range(3):  # one after another, never two at once
            torch.ones(16 << 20)  # 64 MiB

    _peak_of_process(lambda: torch.ones(64 << 20))  # an earlier, higher peak is forgotten
    during, before = _peak_of_process(work)
    assert (during - before) / 2**20 == pytest.approx(64, abs=16)


@pytest.mark.slow
def test_a_step_is_compared_in_time_and_memory_under_both_decoders():
    lines = list(Step("vit_nano_32", batch_size=64, rounds=1).run())
    assert [line["benchmark"] for line in lines] == ["step"] * 4
    for line in lines:
        assert line["figure"] > 0
        assert line["bound"] > 0
    own, cross = lines[:2]
    assert cross["flop_ratio"] < own["flop_ratio"] < 1
