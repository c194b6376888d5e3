"""What a run wrote of itself, read back: losses, evaluations, stages, options and pictures.

Nothing but the run's own log and TensorBoard events is read, so any run can be looked at, at any
time, wherever its folder was copied to.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import UserError
from pipeline.options import flat

NO_STAGE = "everything else"
"""What the stages that a run times leave over."""


@dataclass(frozen=True)
class Point:
    """A log point.

    Attributes:
        step: optimiser steps done.
        epoch: passes over the data done, with a fraction.
        seconds: training took so far; pauses between two starts of the run do not count.
        loss: mean since the last point.
    """

    step: int
    epoch: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class Found:
    """What an evaluator, or the monitor, found of the encoder at a step; `options` are those of
    `train.evaluate.trunk.Evaluation.told`."""

    step: int
    epoch: float
    evaluator: str
    weights: str
    values: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """A run, as its log tells it.

    Attributes:
        folder: of the run.
        options: as its last start gave them, `section.option` -> value.
        points: in the order of their steps, one at least.
        found: in the order in which it was written.
        stages: share of the training's time -> spent in what; they sum to 1 at most.
        total_steps: of the whole run.
        finished: whether all of them are done, and their last checkpoint is written.
    """

    folder: Path
    options: dict[str, Any]
    points: list[Point]
    found: list[Found]
    stages: dict[str, float]
    total_steps: int
    finished: bool

    def seconds(self, step: int) -> float:
        """Of training until a step: those of the last log point up to it, 0 before the first."""
        before = bisect_right([point.step for point in self.points], step)
        return self.points[before - 1].seconds if before else 0.0


def read(folder: Path) -> History:
    """The history of a run that may be training meanwhile.

    Raises:
        ValueError: the folder holds no run, or one without a log point yet; lines that are no log.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} is no run: there is no {path.name} in it; give the --out of a training"
        )
    lines = _lines(path)
    starts = [line for line in lines if line.get("event") == "start"]
    if not starts or any("options" not in line for line in starts):
        raise UserError(f"{path}: no start of a run with its options stands in it")
    clock = _Clock()
    points, found, spent = [], [], dict[str, float]()
    for line in lines:
        if line.get("event") == "start":
            clock.start(line)
        elif "loss" in line and "event" not in line:
            seconds = clock.advance(line)
            points.append(
                Point(line["step"], clock.epoch(line["step"]), clock.seconds, line["loss"])
            )
            for name, share in line.items():
                if name.startswith("time/"):
                    stage = name.removeprefix("time/")
                    spent[stage] = spent.get(stage, 0.0) + share * seconds
        elif line.get("event") == "evaluation":
            found.append(_found(line, clock.epoch(line["step"])))
    if not points:
        raise UserError(f"{path}: the run has not reached its first log point")
    stages = {name: each / max(clock.seconds, 1e-9) for name, each in spent.items()}
    stages[NO_STAGE] = max(0.0, 1 - sum(stages.values()))
    return History(
        folder=folder,
        options=flat(starts[-1]["options"]),
        points=points,
        found=found,
        stages=stages,
        total_steps=starts[-1]["total_steps"],
        finished=any(line.get("event") == "finished" for line in lines),
    )


def pictures(folder: Path, most: int) -> list[tuple[int, Image.Image]]:
    """The pictures of crops that a run drew, each with its step; if there are more than `most`,
    the first, the last, and others evenly between."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    if "crops" not in events.Tags()["images"]:
        return []
    drawn = {event.step: event.encoded_image_string for event in events.Images("crops")}
    steps = sorted(drawn)
    if len(steps) > most:
        steps = [steps[round(n * (len(steps) - 1) / max(most - 1, 1))] for n in range(most)]
    return [(step, Image.open(io.BytesIO(drawn[step])).convert("RGB")) for step in steps]


class _Clock:
    """Epochs and seconds of the steps, over all starts of a run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._step, self._batch = 0, 1
        self._from_step, self._steps_per_epoch = 0, 1

    def start(self, line: dict[str, Any]) -> None:
        self._batch, self._steps_per_epoch = line["effective_batch"], line["steps_per_epoch"]
        # Where the schedule begins: at step 0, unless an elastic restart laid it out anew.
        whole = line["options"]["epochs"] * self._steps_per_epoch
        self._from_step = line["total_steps"] - whole

    def advance(self, line: dict[str, Any]) -> float:
        """Seconds from the log point before to this one."""
        steps, self._step = line["step"] - self._step, line["step"]
        seconds = steps * self._batch / max(line["images_per_second"], 1e-9)
        self.seconds += seconds
        return float(seconds)

    def epoch(self, step: int) -> float:
        return (step - self._from_step) / self._steps_per_epoch


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line that a kill cut off
        if not isinstance(line, dict) or "step" not in line:
            raise UserError(f"{path}, line {number}: not a line of a run's log")
        lines.append(line)
    return lines


def _found(line: dict[str, Any], epoch: float) -> Found:
    about = {"time", "step", "event", "evaluator", "weights", "options"}
    values = {name: value for name, value in line.items() if name not in about}
    weights = line.get("weights", "trained")
    return Found(line["step"], epoch, line["evaluator"], weights, values, line.get("options", {}))
