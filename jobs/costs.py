"""What a step of each recipe of a grid costs, measured beside a step of the reference.

On a CPU the seconds are those that one core works for a step: other programs take none of them,
though they may slow its memory down.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from famt.patches import normalise_images
from jobs.benchmarks import measure
from jobs.benchmarks.training import Training, training
from pipeline.scores import model_scores
from train.config import Pretrain
from train.files import written_whole
from train.signals.config import AttentionConfig, ContentConfig, HardnessConfig

_ROUNDS = 15
_OFF: dict[str, Any] = {
    "content": ContentConfig(source="off"),
    "attention": AttentionConfig(source="off"),
    "hardness": HardnessConfig(source="off"),
}


@dataclass(frozen=True)
class StepCost:
    """Times of a recipe, each over that of a step of the reference, for as many images.

    Attributes:
        weighed: a step with all of the recipe's signals: weigh, sample, gather, forward, backward
            and update.
        plain: a step of its epochs before the weights begin.
        refresh: what scoring images anew takes, with the encoder, of images in memory.
    """

    weighed: float = 1.0
    plain: float = 0.0
    refresh: float = 0.0

    def of(self, run: Pretrain) -> float:
        """Mean cost of a step over a run's epochs, the refreshes of its scores among it."""
        plain = min(run.plain_epochs, run.epochs)
        spent = plain * self.plain + (run.epochs - plain) * self.weighed
        if run.refreshed_kinds and run.refresh.pin is None:
            first = plain or run.refresh.every
            spent += self.refresh * len(range(first, run.epochs, run.refresh.every))
        return spent / run.epochs


def measured(path: Path, runs: Mapping[str, Pretrain], reference: str) -> dict[str, StepCost]:
    """Costs by the names of `runs`: those that stand in a file, and the others, which are measured
    now and added to it.

    Args:
        path: JSON lines, one a recipe.
        runs: what is trained.
        reference: name of the run that is the measure of all.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    against = _told(runs[reference])
    known = {line["options"]: line for line in lines if line["against"] == against}
    lacking: dict[str, str] = {}  # of runs whose steps are the same the first is timed
    for name, run in runs.items():
        if _told(run) not in known:
            lacking.setdefault(_told(run), name)
    if lacking:
        print(f"timing the steps of {len(lacking)} recipe(s) for {path}", flush=True)
    for told, name in lacking.items():
        cost = dataclasses.asdict(_measure(runs[name], runs[reference]))
        line = known[told] = {"recipe": name, **cost, "options": told, "against": against}
        lines.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.writelines(f"{json.dumps(each)}\n".encode() for each in lines)
    fields = [field.name for field in dataclasses.fields(StepCost)]
    return {
        name: StepCost(**{field: known[_told(run)][field] for field in fields})
        for name, run in runs.items()
    }


def _told(run: Pretrain) -> str:
    """What the time of a step may depend on, of all options."""
    unimportant = {
        "shards", "cache", "out", "seed", "epochs", "monitor", "recipe", "monitor_epochs",
        "picture_epochs", "log_steps", "checkpoint_minutes", "resume", "stage",
        "optimiser.base_learning_rate", "optimiser.weight_decay", "optimiser.warmup_epochs",
    }  # fmt: skip
    told = {name: value for name, value, _ in run.differing() if name not in unimportant}
    return json.dumps(told, sort_keys=True, default=str)


def _measure(run: Pretrain, reference: Pretrain) -> StepCost:
    torch.set_num_threads(1)  # its time is the step's work, whatever else the machine does
    weighed = dataclasses.replace(run, plain_epochs=0)
    # Scores that are not there yet would leave a plain step; what they add to one is a gather.
    waited_for = [name for name in _OFF if getattr(run, name).source == "refreshed"]
    weighed = dataclasses.replace(weighed, **{name: _OFF[name] for name in waited_for})
    timed = {"reference": reference, "weighed": weighed}
    if run.plain_epochs:
        timed["plain"] = dataclasses.replace(run, plain_epochs=0, join=run.plain, **_OFF)
    with ExitStack() as stack:
        runs = {name: stack.enter_context(training(each)) for name, each in timed.items()}
        rivals: dict[str, Callable[[], None]] = {name: each.step for name, each in runs.items()}
        if _told(run) == _told(reference):
            del rivals["weighed"]
        if run.refreshed_kinds:
            rivals["refresh"] = partial(_refresh, run.refreshed_kinds, runs["weighed"])
        on_gpu = runs["reference"].run.ranks.device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        taken = measure.seconds(rivals, _ROUNDS, clock=clock)
    unit = reference.batch_size / run.batch_size
    ratios = {
        name: statistics.median(map(truediv, taken[name], taken["reference"])) * unit
        for name in rivals
        if name != "reference"
    }
    return StepCost(**{name: round(ratio, 4) for name, ratio in ratios.items()})


def _refresh(kinds: list[str], steps: Training) -> None:
    """Score as many images anew as a step takes, as `jobs/refresh_scores.py` does."""
    run = steps.run
    with torch.autocast(
        run.ranks.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"
    ):
        model_scores(kinds, run.model.encoder, normalise_images(steps.crops.images))
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize()
