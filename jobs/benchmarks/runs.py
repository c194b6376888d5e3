"""Throughput of whole training runs: loader, signals, join and step together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.training import BenchmarkOptions, open_run, take_steps
from famt.train.config import Pretrain


@dataclass(frozen=True)
class Runs(BenchmarkOptions):
    """Crops/s of training runs by recipe, against the first recipe, with their stages' shares.

    Runs are those of `famt pretrain`, the next batch ahead in a GPU's side stream, but refresh no
    maps: see benchmark `refresh`.
    """

    recipes: tuple[str, ...] = ("mae", "famt", "uniform")
    """recipes to train; the first is the bound of the others"""
    options: str = ""
    """more options of `famt pretrain` for all of them, as one string"""
    steps: Annotated[int, Ge(1)] = 20
    """timed steps, after half as many for warm-up"""

    def run(self) -> Iterator[Report]:
        bound = None
        with measure.scored(self.shards, self.photos) as (urls, cache):
            for recipe in self.recipes:
                config = self.config(urls, cache.url, f"--recipe {recipe} {self.options}")
                rate, details = self._measure(config)
                bound = bound or rate
                unit = f"crops/s of training with {recipe}, {self.setting}"
                line = measure.line("runs", unit, rate, f"crops/s with {self.recipes[0]}", bound)
                yield {**line, **{name: round(value, 3) for name, value in details.items()}}

    def _measure(self, config: Pretrain) -> tuple[float, dict[str, float]]:
        on_gpu = config.device == "cuda"
        with open_run(config) as run:
            take_steps(run, self.steps // 2)
            run.clock.read()  # waits for a GPU
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            take_steps(run, self.steps)
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            details = {f"share_of_{n}": each / seconds for n, each in run.clock.read().items()}
            if on_gpu:
                details["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return self.steps * config.batch_size / seconds, details
