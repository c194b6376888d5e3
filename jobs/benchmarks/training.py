"""A real training run, of which single steps are timed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from famt.pipeline.cache import ScoreCache
from famt.pipeline.join import PatchBatch
from famt.pipeline.loader import CropBatch
from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.signals.signal import Signal
from famt.train.signals.weights import build_signals


@dataclass(frozen=True)
class Steps:
    """A run that takes its steps on the same crops, so that no step waits for data.

    Attributes:
        run: by its options; give it other signals to weigh patches by.
        crops: a batch from its loader.
    """

    run: Run
    crops: CropBatch

    def signals(self, **slots: object) -> list[Signal]:
        """Signals for this run by other options, `attention=AttentionConfig(...)` say."""
        config = dataclasses.replace(self.run.config, **slots)  # type: ignore[arg-type]
        return build_signals(dataclasses.replace(self.run.context, config=config))

    def step(self) -> None:
        """Weigh, sample, gather; forward, backward and update."""
        self.run.forward_backward(self.run.prepare(self.crops, self.run.step))
        self.run.update()
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize()


def take_steps(run: Run, count: int) -> None:
    """Train for so many steps as the loop does, the next batch ahead in the side stream."""
    run.model.train()
    crops: Iterator[CropBatch] = iter(())
    ahead: PatchBatch | None = None
    for _ in range(count + 1):
        now = ahead
        if now is not None:
            run.forward_backward(now)
        with run.side_stream:
            with run.clock.stage("data_wait", on_host=True):
                found = next(crops, None)
                while found is None:  # what is left of an epoch may be nothing
                    crops = iter(run.loader)
                    found = next(crops, None)
            ahead = run.prepare(found, run.step + 1)
        if now is not None:
            run.update()


@contextmanager
def training(config: Pretrain) -> Iterator[Steps]:
    """A run by these options, but in a temporary folder and unwatched."""
    with tempfile.TemporaryDirectory(prefix="famt-run-") as out, join_ranks(config.device) as ranks:
        refresh = dataclasses.replace(config.refresh, wait=False)  # no job makes maps here
        run = Run(dataclasses.replace(config, out=Path(out), monitor=[], refresh=refresh), ranks)
        run.model.train()
        try:
            yield Steps(run, next(iter(run.loader)))
        finally:
            run.close(finished=False)


def unweighed(
    urls: list[str],
    cache: ScoreCache,
    model: str,
    batch_size: int,
    threads: int,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Pretrain:
    """Options of a FAMT run without signals, over shards that are in the cache."""
    return Pretrain(
        shards=urls,
        cache=cache.url,
        out=Path(),
        model=model,
        batch_size=batch_size,
        frequency=FrequencyConfig(source="off"),
        attention=AttentionConfig(source="off"),
        threads=threads,
        device=device,
        precision=precision,
    )
