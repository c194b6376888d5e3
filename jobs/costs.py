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

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.training import Training, training
from famt.patches import normalise_images
from famt.pipeline.model_scores import model_scores
from famt.train.config import Pretrain
from famt.train.files import written_whole
from famt.train.signals.config import AttentionConfig, FrequencyConfig, HardnessConfig

_ROUNDS = 15
_OFF: dict[str, Any] = {
    "frequency": FrequencyConfig(source="off"),
    "attention": AttentionConfig(source="off"),
    "hardness": HardnessConfig(source="off"),
}


@dataclass(frozen=True)
class StepCost:
    """Times of a recipe, each over that of a step of the reference.

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
        plain = min(run.plain_until, run.epochs)
        spent = plain * self.plain + (run.epochs - plain) * self.weighed
        spent += len(run.refreshes) * self.refresh / run.crops_per_image  # images, not crops
        return spent / run.epochs


def known(path: Path, runs: Mapping[str, Pretrain], reference: str) -> dict[str, StepCost]:
    """Costs, by the names of `runs`, of those whose steps were timed already.

    Args:
        path: JSON lines, one a recipe; need not be there.
        runs: what is trained.
        reference: name of the run that is the measure of all.
    """
    fields = [field.name for field in dataclasses.fields(StepCost)]
    against = _told(runs[reference])
    costs = {
        line["options"]: StepCost(**{field: line[field] for field in fields})
        for line in _lines(path)
        if line["against"] == against
    }
    return {name: costs[_told(run)] for name, run in runs.items() if _told(run) in costs}


def measured(path: Path, runs: Mapping[str, Pretrain], reference: str) -> dict[str, StepCost]:
    """Costs by the names of `runs`: those that stand in a file, and the others, which are measured
    now, on this machine, and added to it. Arguments as those of `known`."""
    while lacking := runs.keys() - known(path, runs, reference).keys():
        name = next(name for name in runs if name in lacking)  # it may stand for others, too
        line = {
            "recipe": name,
            **dataclasses.asdict(_measure(runs[name], runs[reference])),
            "options": _told(runs[name]),
            "against": _told(runs[reference]),
        }
        lines = [*_lines(path), line]
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.writelines(f"{json.dumps(each)}\n".encode() for each in lines)
    return known(path, runs, reference)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _told(run: Pretrain) -> str:
    """What the time of a step may depend on, of all options."""
    unimportant = {
        "shards", "cache", "out", "seed", "epochs", "monitor", "recipe", "monitor_epochs",
        "picture_epochs", "log_steps", "checkpoint_minutes", "keep_checkpoints", "resume",
        "elastic", "stage",
        "optimiser.base_learning_rate", "optimiser.weight_decay", "optimiser.warmup_epochs",
    }  # fmt: skip
    told = {name: value for name, value, _ in run.differing() if name not in unimportant}
    return json.dumps(told, sort_keys=True, default=str)


def _measure(run: Pretrain, reference: Pretrain) -> StepCost:
    torch.set_num_threads(1)  # its time is the step's work, whatever else the machine does
    timed = {"reference": _weighed(reference), "weighed": _weighed(run)}
    if run.plain_until:
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
    ratios = {
        name: statistics.median(map(truediv, taken[name], taken["reference"]))
        for name in rivals
        if name != "reference"
    }
    return StepCost(**{name: round(ratio, 4) for name, ratio in ratios.items()})


def _weighed(run: Pretrain) -> Pretrain:
    """A run of the steps after its plain epochs."""
    # Scores that are not there yet would leave a plain step; what they add to one is a gather.
    waited_for = [name for name in _OFF if getattr(run, name).source.startswith("refreshed")]
    return dataclasses.replace(run, plain_epochs=0, **{name: _OFF[name] for name in waited_for})


def _refresh(kinds: list[str], steps: Training) -> None:
    """Score as many images anew as a step takes crops, as `jobs/refresh_scores.py` does."""
    run = steps.run
    with torch.autocast(
        run.ranks.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"
    ):
        model_scores(kinds, run.model.encoder, normalise_images(steps.crops.images))
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize()
