"""Training runs for benchmarks to time."""

from __future__ import annotations

import dataclasses
import gc
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from famt.models import MODELS
from famt.pipeline.loading.limits import own_cores
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.loading.masking import PatchBatch
from famt.pipeline.options import Checked
from famt.train.command_line import parse
from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run


@dataclass(frozen=True)
class BenchmarkOptions(Checked):
    """Options of all benchmarks that train."""

    shards: list[str] = field(default_factory=list)
    """tars to train on; a shard of synthetic photos if left out"""
    photos: Annotated[int, Ge(1)] = 256
    """photos in the synthetic shard"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """model size"""
    batch_size: Annotated[int, Ge(1)] = 16
    """crops a step"""
    threads: Annotated[int, Ge(1)] = field(default_factory=own_cores)
    """CPU threads for computing and decoding"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device to train on"""

    @property
    def setting(self) -> str:
        """Part of a figure's unit."""
        return (
            f"{self.model}, {self.precision}, {self.device}, batch {self.batch_size}, "
            f"{self.threads} threads"
        )

    def config(self, urls: list[str], cache: str, options: str) -> Pretrain:
        """Options of a run: these, then `options` as on the command line of `famt pretrain`."""
        arguments = [
            "--shards", *urls, "--cache", cache, "--out", "unused", "--model", self.model,
            "--batch-size", str(self.batch_size), "--threads", str(self.threads),
            "--precision", self.precision, "--device", self.device, "--picture-epochs", "0",
        ]  # fmt: skip
        return parse([*arguments, *shlex.split(options)], None)


@contextmanager
def open_run(config: Pretrain) -> Iterator[Run]:
    """A run of these options in a temporary folder, without monitor and refresh job."""
    gc.collect()  # a run before it may be in a cycle, and its memory would be counted here
    with tempfile.TemporaryDirectory(prefix="famt-run-") as out, join_ranks(config.device) as ranks:
        refresh = dataclasses.replace(config.refresh, wait=False)
        run = Run(dataclasses.replace(config, out=Path(out), monitor=[], refresh=refresh), ranks)
        run.model.train()
        try:
            yield run
        finally:
            run.close(finished=False)


@dataclass(frozen=True)
class Steps:
    """A run that repeats its step on one batch of crops, so that no step waits for data."""

    run: Run
    crops: CropBatch

    def accumulate(self) -> None:
        """Signals, sampling, gathering, forward and backward pass."""
        self.run.forward_backward(self.run.prepare(self.crops, self.run.step))

    def take(self, count: int) -> None:
        """Steps as the loop takes them, see `take_steps`; returns when the GPU is done."""
        take_steps(self.run, count, self.crops)
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> None:
        """A whole training step, nothing ahead; returns when the GPU is done."""
        self.accumulate()
        self.run.update()
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def open_steps(config: Pretrain) -> Iterator[Steps]:
    """Steps of a run as `open_run` makes it."""
    with open_run(config) as run:
        yield Steps(run, next(iter(run.loader)))


def take_steps(run: Run, count: int, held: CropBatch | None = None) -> None:
    """Take training steps as the loop does, with the next batch ahead in the side stream: of the
    loader's crops, or always of those held."""
    crops: Iterator[CropBatch] = iter(())
    ahead: PatchBatch | None = None
    for number in range(count + 1):
        now = ahead
        if now is not None:
            run.forward_backward(now)
        if number < count:
            with run.side_stream:
                loaded = held
                with run.clock.stage("data_wait", on_host=True):
                    while loaded is None:
                        loaded = next(crops, None)
                        if loaded is None:  # an epoch is over
                            crops = iter(run.loader)
                ahead = run.prepare(loaded, run.step + 1)
        if now is not None:
            run.update()
