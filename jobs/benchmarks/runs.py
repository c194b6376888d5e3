"""How fast whole trainings go: loader, signals, join and step together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.training import take_steps
from famt.models import MODELS
from famt.pipeline.loader import own_cores
from famt.pipeline.options import Checked
from famt.pipeline.scores import ScoreSpec
from famt.train.config import Pretrain, parse
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run


@dataclass(frozen=True)
class Runs(Checked):
    """Crops/s of trainings by recipe, beside the first recipe's, and what they wait for.

    Each recipe trains as `famt pretrain` does, the next batch ahead in a GPU's side stream. Its
    refreshed maps are left out: `refresh` measures what making them costs.
    """

    shards: list[str] = field(default_factory=list)
    """tars to train on"""
    recipes: tuple[str, ...] = ("mae", "famt", "uniform")
    """what to train; the first one is the measure of the others"""
    options: str = ""
    """further options of `famt.train.pretrain` for all of them, in one string"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    batch_size: Annotated[int, Ge(1)] = 16
    """crops a step"""
    steps: Annotated[int, Ge(1)] = 20
    """steps that are timed, after half as many that are not"""
    photos: Annotated[int, Ge(1)] = 256
    """photos of the made-up shard, where none is given"""
    threads: Annotated[int, Ge(1)] = field(default_factory=own_cores)
    """CPU threads that decode"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """what to train on"""

    def run(self) -> Iterator[Report]:
        bound = None
        with measure.scored(self.shards, ScoreSpec(), self.photos) as (urls, cache):
            for recipe in self.recipes:
                arguments = [
                    "--recipe", recipe, "--shards", *urls, "--cache", cache.url,
                    "--model", self.model, "--batch-size", str(self.batch_size),
                    "--threads", str(self.threads),
                    "--precision", self.precision, "--device", self.device, "--picture-epochs", "0",
                    *self.options.split(),
                ]  # fmt: skip
                with tempfile.TemporaryDirectory(prefix="famt-run-") as out:
                    found = self._measure(parse([*arguments, "--out", out], None))
                bound = bound or found["crops_per_second"]
                yield {
                    **measure.line(
                        "runs",
                        f"crops/s of a training by {recipe}, {self.model}, {self.precision}, "
                        f"{self.device}, batch {self.batch_size}, {self.threads} threads",
                        found.pop("crops_per_second"),
                        f"crops/s by {self.recipes[0]}",
                        bound,
                    ),
                    **{name: round(value, 3) for name, value in found.items()},
                }

    def _measure(self, config: Pretrain) -> dict[str, float]:
        on_gpu = config.device == "cuda"
        with join_ranks(config.device) as ranks:
            run = Run(config, ranks)
            take_steps(run, self.steps // 2)
            run.clock.read()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            take_steps(run, self.steps)
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            stages = run.clock.read()
            run.close(finished=False)
        found = {"crops_per_second": self.steps * config.batch_size / seconds}
        found |= {f"share_of_{name}": each / seconds for name, each in stages.items()}
        if on_gpu:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found
