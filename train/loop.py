"""The training loop: epochs, steps, log points, checkpoints, and stopping when asked."""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from famt.models import ModelConfig
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.loader import CropBatch, CropLoader
from famt.pipeline.loading.resident import crop_loader
from famt.pipeline.wording import counted
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint, Component, Elastic, resume
from famt.train.config import TrainingOptions
from famt.train.distributed import Ranks
from famt.train.log import Log
from famt.train.optimisation import Optimisation
from famt.train.side_stream import SideStream
from famt.train.stop import Stop
from famt.train.timing import Clock
from famt.train.trackers import Tracked, require

Batch = TypeVar("Batch")

_SHOWN = 6  # crops in a picture


class Training(ABC, Generic[Batch]):
    """A training run. All ranks call the same methods in the same order.

    Attributes:
        name: of the kind of training, for the progress bar.
        id: of the run.
        resumed: the checkpoint to resume from, until it is restored.
        exact: whether to resume with the very next batch, or at the start of the epoch.
        config: options of the run.
        ranks: this rank among those of the run.
        clock: times of the stages of a step.
        side_stream: the CUDA stream in which the next batch is prepared.
        samples: the training images.
        loader: yields an epoch of crops each time it is iterated.
        model: in training; `method` and `sizes` rebuild it from a checkpoint.
        optimisation: optimiser and schedule.
        log: on the main rank, while the loop runs.
    """

    name = "train"
    config: TrainingOptions
    loader: CropLoader
    model: nn.Module
    method: str
    sizes: ModelConfig
    optimisation: Optimisation
    log: Log | None = None

    def __init__(
        self,
        config: TrainingOptions,
        samples: SampleTable,
        ranks: Ranks,
        lost: Callable[[Checkpoint], list[Path]] = lambda _: [],
    ) -> None:
        if ranks.is_main:
            require(config.track)
        if ranks.device.type == "cuda":
            # The host has little to compute; more threads would spin beside those that decode.
            torch.set_num_threads(1)
        self.config, self.samples, self.ranks = config, samples, ranks
        self.clock, self.side_stream = Clock(ranks.device), SideStream(ranks.device)
        self.resumed, self.exact = resume(config, self.identity(), ranks, lost)
        new = f"run-{uuid.uuid4().hex[:12]}"
        self.id: str = self.resumed.run if self.resumed else ranks.from_main(lambda: new)
        torch.manual_seed(config.seed)

    def open_loader(self, image_size: int) -> CropLoader:
        """The loader of this rank's crops, of `image_size` px."""
        return crop_loader(
            self.samples,
            self.config.loader(image_size),
            drop_last=True,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            device=self.ranks.device,
            seed=self.config.seed,
            first_epoch=self.resumed.epoch if self.resumed else 0,
        )

    def components(self) -> dict[str, Component]:
        """The components whose state a checkpoint keeps, in the order of restoring."""
        return {"model": self.model, "optimisation": self.optimisation}

    def own_components(self) -> dict[str, Component]:
        """Components that each rank has of its own."""
        return {"loader": self.loader}

    def restore(self) -> None:
        """Load the checkpoint to resume from, if there is one, into the finished components."""
        resumed, self.resumed = self.resumed, None  # so that its copy of the weights is freed
        if not resumed:
            return
        for name, component in self.components().items():
            if isinstance(component, Elastic) and not self.exact:
                component.restart(resumed.components[name], resumed.epoch)
            else:
                component.load_state_dict(resumed.components[name])
        own = self.own_components() if self.exact else {}
        for name, component in own.items():  # {}: the checkpoint is older than the component
            component.load_state_dict(resumed.ranks[self.ranks.rank].get(name, {}))

    @property
    def step(self) -> int:
        """Optimiser steps done; never decreases."""
        return self.optimisation.step

    @property
    def last_step(self) -> int:
        """Step at which the run ends."""
        return self.optimisation.last_step

    def plan(self) -> str:
        """Text with all numbers that follow from the options, printed at the start."""
        ranks = counted(self.ranks.world_size, "rank")
        slow = self.ranks.device.type == "cuda" and self.config.precision == "fp32"
        lines = {
            "run": f"{self.config.out} on {self.ranks.device}, {ranks}, {self.config.precision}"
            + (" (without tensor cores; --precision bf16 uses them)" if slow else "")
            + (f", resumed from the checkpoint of step {self.step}" if self.step else ""),
            **self.derived(),
        }
        return "\n".join(f"{name:14}{text}" for name, text in lines.items())

    @abstractmethod
    def derived(self) -> dict[str, str]:
        """Lines of the plan, by name."""

    def begin_epoch(self, epoch: int, stop: Stop) -> bool:
        """Called before the first step of an epoch; False if asked to stop meanwhile."""
        return True

    @abstractmethod
    def prepare(self, crops: CropBatch, step: int) -> Batch:
        """Turn crops into the batch of a step."""

    @abstractmethod
    def forward_backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of a batch; returns the mean loss, on the device."""

    def scalars(self) -> dict[str, float]:
        """Values of a log point besides the loss; called on the main rank."""
        return {"learning_rate": self.optimisation.present_learning_rate}

    @abstractmethod
    def end_epoch(self, epoch: int, stop: Stop) -> bool:
        """Called after the last step of an epoch; False if asked to stop meanwhile, and then called
        again on resume."""

    def close(self, *, finished: bool) -> None:
        """Called at the end: the run is finished, or was stopped."""

    def update(self) -> None:
        """Take an optimiser step with the present gradients."""
        self.side_stream.join()
        with self.clock.stage("update"):
            self.optimisation.update()
        self.side_stream.weights_are_ready()

    def save(self) -> None:
        """Write a checkpoint of the state of all ranks."""
        of_ranks = self.ranks.gather(_states(self.own_components()))
        if self.ranks.is_main:
            state = Checkpoint(
                run=self.id,
                step=self.step,
                epoch=self.optimisation.epoch,
                method=self.method,
                sizes=dataclasses.asdict(self.sizes),
                components=_states(self.components()),
                ranks=of_ranks,
                config={**self.config.describe(), **self.identity()},
            )
            path = checkpoint.save(self.config.out, state, self.config.keep_checkpoints)
            if self.log:
                self.log.event(self.step, "checkpoint", file=path.name)
        # Wait for a slow disk here: collectives of gradients time out after ten minutes.
        self.ranks.gather(None)

    def identity(self) -> dict[str, Any]:
        """What must be the same on resume, besides the options."""
        return {
            "device": self.ranks.device.type,
            "world_size": self.ranks.world_size,
            "data": self.samples.digest,
        }

    def picture(self, crops: CropBatch | None, epoch: int) -> Image.Image | None:
        """A picture of crops, if one is due; called on the main rank, with an epoch's first crops
        at its start and with None after the last step."""
        return None

    def autocast(self) -> torch.autocast:
        """Autocast to the precision of the run."""
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=bf16)

    def train(self, stop: Stop) -> bool:
        """Train until the last step, or until asked to stop, and write a checkpoint; whether all
        steps are done."""
        if self.step == self.last_step and not self.loader.step:
            if self.ranks.is_main:
                print(
                    f"{self.config.out} is finished: all {self.step} steps were done before. A "
                    "longer run is a new one: give another --out"
                )
            self.close(finished=True)
            return True
        if self.ranks.is_main:
            print(self.plan(), flush=True)
            self.log = Log(
                self.config.out,
                self.step,
                self.last_step,
                self.optimisation.effective_batch,
                self.clock,
                self.name,
                Tracked(self.config.track, self.id, self.config.describe()),
            )
            self.log.event(
                self.step,
                "start",
                run=self.id,
                epoch=self.loader.epoch,
                steps_per_epoch=self.loader.steps_per_epoch,
                total_steps=self.last_step,
                effective_batch=self.optimisation.effective_batch,
                images=len(self.samples),
                options=self.config.describe(),
                **self.identity(),
            )
        self._saved_at, self._saved = time.monotonic(), self._position
        self._recent: list[tuple[Tensor, Tensor]] = []  # losses and rows since the last log point
        try:
            finished = self._epochs(stop)
        finally:
            if self.log:
                self.log.end_bar()  # so that an error is the last line on the terminal
        if self.log:
            self.log.event(self.step, "finished" if finished else "stopped by a signal")
            if not finished:
                print(
                    f"{self.config.out} stopped after step {self.step} of {self.last_step}, with a "
                    "checkpoint; the same command resumes"
                )
            self.log.close()
        return finished

    def _epochs(self, stop: Stop) -> bool:
        """Train, write a checkpoint and call `close`; False if asked to stop."""
        stopped = False
        # The last epoch still has to be ended after the last step.
        while (self.step < self.last_step or self.loader.step) and not stopped:
            stopped = not self._epoch(stop)
        if self._position != self._saved:
            if self._recent:  # stopped, or at the end of an epoch, between log points
                self._log_point()
            self._save()
        self.close(finished=not stopped)
        return not stopped

    def _epoch(self, stop: Stop) -> bool:
        """The remaining steps of an epoch; False if asked to stop."""
        epoch, crops = self.loader.epoch, iter(self.loader)
        if self.loader.step == 0 and not self.begin_epoch(epoch, stop):
            return False
        self._first: CropBatch | None = None
        stopping = False
        batch = self._next(crops, self.step)
        if self._first is not None:
            self._draw(self._first, epoch)
        while batch is not None:
            loss = self.forward_backward(batch.content)
            # Checkpoints hold no batches, so none is prepared before one is due.
            at_log_point = (self.step + 1) % self.config.log_steps == 0
            wanted = self.side_stream.is_open and not at_log_point and not stopping
            ahead = self._next(crops, self.step + 1) if wanted else None
            self.update()
            self._recent.append((loss, batch.rows))
            if self.log:
                self.log.step()
            if at_log_point or self.step == self.last_step:
                self._log_point()
            # The last checkpoint is written after `end_epoch`, which may run the monitor.
            if self.step < self.last_step:
                stopping = stopping or self.ranks.any(stop.asked)
                if stopping and ahead is None:
                    return False
                if at_log_point and self.ranks.gather(self._is_due())[0]:
                    self._save()
            batch = ahead or self._next(crops, self.step)
        if not self.end_epoch(epoch, stop):
            return False
        if self.step == self.last_step:
            self._draw(None, epoch)
        next(crops, None)  # moves the loader to its next epoch
        return True

    def _next(self, crops: Iterator[CropBatch], step: int) -> _Next[Batch] | None:
        """The epoch's next batch or None; on a GPU, prepared in the side stream."""
        with self.side_stream:
            if self.loader.step == self.loader.steps_per_epoch:
                return None
            with self.clock.stage("data_wait", on_host=True):
                found = next(crops)
            if self.loader.step == 1:
                first = found.first(_SHOWN)
                self._first = replace(first, images=first.images.clone())
            return _Next(self.prepare(found, step), found.rows)

    def _draw(self, crops: CropBatch | None, epoch: int) -> None:
        picture = self.picture(crops, epoch) if self.log else None
        if self.log and picture is not None:
            self.log.picture(self.step, picture)

    def _is_due(self) -> bool:
        """Whether a checkpoint is due, by this rank's clock."""
        return time.monotonic() - self._saved_at > self.config.checkpoint_minutes * 60

    def _save(self) -> None:
        self.save()
        self._saved_at, self._saved = time.monotonic(), self._position

    @property
    def _position(self) -> tuple[int, int]:
        """Position in the data: epoch and batch."""
        return self.loader.epoch, self.loader.step

    def _log_point(self) -> None:
        """Log the steps since the last log point; always before a checkpoint, to check losses."""
        mean = self._mean_loss()
        if self.log:
            epoch = self.loader.epoch if self.loader.step else self.loader.epoch - 1
            self.log.point(self.step, epoch, {"loss": mean, **self.scalars()})

    def _mean_loss(self) -> float:
        """Mean loss over ranks and over the steps since the last log point.

        Raises:
            FloatingPointError: on all ranks, if a loss is not finite; its rank writes the keys of
                the batch to a file.
        """
        recent, self._recent = self._recent, []
        losses = torch.stack([loss for loss, _ in recent]).tolist()
        first = self.step - len(recent) + 1
        bad = None
        for step, (loss, (_, rows)) in enumerate(zip(losses, recent, strict=True), first):
            if not math.isfinite(loss):
                path = self.config.out / f"nan-rank{self.ranks.rank}-step{step:08d}.txt"
                path.write_text("".join(f"{self.samples.key(row)}\n" for row in rows.tolist()))
                bad = (
                    f"the loss is {loss} at step {step}; the samples are in {path}. Look at those "
                    "images, or resume from the last checkpoint with a lower "
                    "--optimiser.base-learning-rate and --elastic; if the loss is not finite at "
                    "once, remove that checkpoint: training diverged before it was written"
                )
                break
        everywhere = self.ranks.gather((sum(losses) / len(losses), bad))
        found = next((each for _, each in everywhere if each), None)
        if found:
            raise FloatingPointError(found)
        return sum(mean for mean, _ in everywhere) / len(everywhere)


@dataclass(frozen=True)
class _Next(Generic[Batch]):
    """A prepared batch, and the rows of its samples."""

    content: Batch
    rows: Tensor


def _states(components: dict[str, Component]) -> dict[str, dict[str, Any]]:
    return {name: component.state_dict() for name, component in components.items()}
