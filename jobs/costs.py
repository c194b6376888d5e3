"""Cost of a training step of each row of a grid, relative to a step of the reference row.

On a CPU, costs are CPU seconds of one core: other programs may slow the memory down, but their time
does not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.training import Steps, open_steps
from famt.patches import normalise_images
from famt.pipeline.scoring.model_scores import model_scores
from famt.train.config import Pretrain
from famt.train.signals.config import OFF

_ROUNDS = 15
_STEPS_ON_A_GPU = 4  # a round's, so that preparing a batch can overlap the step before


@dataclass(frozen=True)
class StepCost:
    """Times of a row, each as a share of a step of the reference.

    Attributes:
        weighed: a step with all signals of the row, from weights to optimiser.
        plain: a step of `--plain-epochs`.
        refresh: refreshing the scores of as many images as a step has crops.
    """

    weighed: float = 1.0
    plain: float = 0.0
    refresh: float = 0.0

    def of(self, run: Pretrain) -> float:
        """Mean cost of a step over a run, refreshes included."""
        plain = min(run.plain_until, run.epochs)
        spent = plain * self.plain + (run.epochs - plain) * self.weighed
        spent += len(run.refreshes) * self.refresh / run.crops_per_image  # per image, not per crop
        return spent / run.epochs


def step_key(run: Pretrain) -> str:
    """A key that runs share if their steps cost the same."""
    rates = {"base_learning_rate": 1.0, "weight_decay": 0.0, "warmup_epochs": 0.0}
    optimiser = dataclasses.replace(run.optimiser, **rates)
    alike = dataclasses.replace(
        run, epochs=1, seed=0, recipe="", out=Path(), optimiser=optimiser
    ).differing()
    text = json.dumps([(name, value) for name, value, _ in alike], default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def measured(run: Pretrain, reference: Pretrain) -> StepCost:
    """Time steps of a run and of the reference in turns, on this machine."""
    torch.set_num_threads(1)  # so that CPU time is the step's work, whatever else the machine does
    timed = {"reference": _weighed(reference), "weighed": _weighed(run)}
    if run.plain_until:
        timed["plain"] = dataclasses.replace(run, plain_epochs=0, join=run.plain, **_off(run))
    with ExitStack() as stack:
        runs = {name: stack.enter_context(open_steps(each)) for name, each in timed.items()}
        on_gpu = runs["reference"].run.ranks.device.type == "cuda"
        count = _STEPS_ON_A_GPU if on_gpu else 1
        rivals: dict[str, Callable[[], None]] = {
            name: partial(each.take, count) for name, each in runs.items()
        }
        if step_key(run) == step_key(reference):
            del rivals["weighed"]  # 1 by definition
        if run.refreshed_kinds:
            rivals["refresh"] = partial(_refresh, run.refreshed_kinds, runs["weighed"], count)
        clock = time.perf_counter if on_gpu else time.process_time
        taken = measure.seconds(rivals, _ROUNDS, clock=clock)
    reference_seconds = taken.pop("reference")
    return StepCost(**{
        name: round(statistics.median(map(truediv, seconds, reference_seconds)), 4)
        for name, seconds in taken.items()
    })  # fmt: skip


def _weighed(run: Pretrain) -> Pretrain:
    """The run without its plain epochs."""
    # Before the first maps, a refreshed signal would turn the step into a plain one. With maps it
    # only adds a gather.
    waited_for = {
        name: slot
        for name, slot in _off(run).items()
        if run.slots[name].is_refreshed and not run.slots[name].is_cached
    }
    return dataclasses.replace(run, plain_epochs=0, **waited_for)


def _off(run: Pretrain) -> dict[str, Any]:
    """The slots of a run's signals, all empty."""
    return {name: type(slot)(source=OFF) for name, slot in run.slots.items()}


def _refresh(kinds: list[str], steps: Steps, count: int) -> None:
    """Refresh the scores of one batch, `count` times, as the refresh job does."""
    run = steps.run
    for _ in range(count):
        with run.autocast():
            model_scores(kinds, run.model.encoder, normalise_images(steps.crops.images))
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize()
