"""What a run wrote of itself, read back: losses, evaluations, stages, options and pictures.

Nothing but the run's own log and TensorBoard events is read, so any run can be looked at, at any
time, wherever its folder was copied to.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.pipeline.errors import UserError
from famt.pipeline.options import flat

NO_STAGE = "everything else"
"""Time outside the measured stages."""


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
class Basis:
    """What a figure was measured on: figures of one basis alone compare.

    Attributes:
        key: the same for the same images and options, wherever the images lie.
        text: for people.
    """

    key: str
    text: str = field(compare=False)


@dataclass(frozen=True)
class Found:
    """What an evaluator, or the monitor, found of the encoder at a step; `options` are those of
    `famt.train.evaluate.features.Evaluation.told`."""

    step: int
    epoch: float
    evaluator: str
    weights: str
    values: dict[str, Any]
    options: dict[str, Any]
    basis: Basis


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
        images: of an epoch, without those of its last, incomplete batch.
        data: digest of the images that it trains on, if its log tells it.
        corrupt: how many lines of its log can't be read, and are passed over.
    """

    folder: Path
    options: dict[str, Any]
    points: list[Point]
    found: list[Found]
    stages: dict[str, float]
    total_steps: int
    finished: bool
    images: int
    data: str | None
    corrupt: int

    def seconds(self, step: int) -> float:
        """Of training until a step: those of the last log point up to it, 0 before the first."""
        before = bisect_right([point.step for point in self.points], step)
        return self.points[before - 1].seconds if before else 0.0


def read(folder: Path) -> History:
    """The history of a run that may be training meanwhile.

    Raises:
        UserError: the folder holds no run, or one without a log point yet.
    """
    return parse(folder, *read_lines(folder))


def read_lines(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's log, and how many cannot be read.

    Raises:
        UserError: the folder holds no run.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} is no run: there is no {path.name} in it; give the --out of a training"
        )
    *texts, unfinished = path.read_text(errors="replace").split("\n")
    lines, corrupt = [], 0
    for text in (*texts, unfinished) if unfinished.endswith("}") else texts:
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
            lines.append(line)
        except (ValueError, KeyError, TypeError):  # a kill, or a disk, garbled it
            corrupt += 1
    return lines, corrupt


def parse(folder: Path, lines: Iterable[dict[str, Any]], corrupt: int = 0) -> History:
    """The history that the lines of a log tell.

    Args:
        folder: of the run, by whose name errors and reports call it; it need not be there.
        lines: of its log.
        corrupt: how many others could not be read.

    Raises:
        UserError: they hold no start of a run, or no log point.
    """
    reader = _Reader()
    for line in lines:
        try:
            reader.take(line)
        except (ValueError, KeyError, TypeError, AttributeError):  # garbled, but still JSON
            corrupt += 1
    if not reader.options:
        raise UserError(f"{folder}: its log holds no start of a run with its options")
    if not reader.points:
        raise UserError(f"{folder}: the run has not reached its first log point")
    return History(
        folder=folder,
        options=reader.options,
        points=reader.points,
        found=reader.found,
        stages=reader.stages(),
        total_steps=reader.total_steps,
        finished=reader.finished,
        images=reader.images,
        data=reader.data,
        corrupt=corrupt,
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


class _Reader:
    """Adds up the lines of a log over all starts of a run."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}  # of the last start, as all that follows
        self.data: str | None = None
        self.total_steps = 0
        self._batch, self._steps_per_epoch = 0, 1
        self.images = 0
        self._from_step = 0  # that epochs are counted from
        self.points: list[Point] = []
        self.found: list[Found] = []
        self.finished = False
        self._spent: dict[str, float] = {}  # seconds by stage
        self._seconds, self._step = 0.0, 0

    def take(self, line: dict[str, Any]) -> None:
        """Take up the next line.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: no run writes such a line.
        """
        step, event = line["step"], line.get("event")
        if event == "start":
            self._begin(line)
        elif event == "evaluation":
            self.found.append(self._found(line, step))
        elif event is None:
            self._advance(line, step)
        self.finished |= event == "finished"

    def stages(self) -> dict[str, float]:
        """Share of the time -> spent in what."""
        stages = {name: each / max(self._seconds, 1e-9) for name, each in self._spent.items()}
        return {**stages, NO_STAGE: max(0.0, 1 - sum(stages.values()))}

    def _begin(self, line: dict[str, Any]) -> None:
        batch, an_epoch, total = (
            int(line[each]) for each in ("effective_batch", "steps_per_epoch", "total_steps")
        )
        options = flat(line["options"])
        # Where the schedule begins: at step 0, unless an elastic restart laid it out anew.
        self._from_step = total - options["epochs"] * an_epoch
        self._batch, self._steps_per_epoch, self.total_steps = batch, an_epoch, total
        self.options, self.data = options, line.get("data")
        crops = [value for name, value in options.items() if name.endswith("crops_per_image")]
        self.images = an_epoch * batch // (crops[0] if crops else 1)

    def _advance(self, line: dict[str, Any], step: int) -> None:
        images = (step - self._step) * self._batch
        seconds = images / max(line["images_per_second"], 1e-9)
        loss = float(line["loss"])
        spent = {
            name.removeprefix("time/"): float(share) * seconds
            for name, share in line.items()
            if name.startswith("time/")
        }
        self._step, self._seconds = step, self._seconds + seconds
        self.points.append(Point(step, self._epoch(step), self._seconds, loss))
        for stage, each in spent.items():
            self._spent[stage] = self._spent.get(stage, 0.0) + each

    def _epoch(self, step: int) -> float:
        return (step - self._from_step) / self._steps_per_epoch

    def _found(self, line: dict[str, Any], step: int) -> Found:
        about = {"time", "step", "event", "evaluator", "weights", "options"}
        values = {name: value for name, value in line.items() if name not in about}
        options, evaluator = line.get("options", {}), line["evaluator"]
        basis = self._watched(line) if evaluator == "monitor" else _tested(line, options)
        weights = line.get("weights", "trained")
        return Found(step, self._epoch(step), evaluator, weights, values, options, basis)

    def _watched(self, line: dict[str, Any]) -> Basis:
        """What the monitor looked at; old logs do not say which images these were."""
        shards = " ".join(self.options.get("monitor") or [])
        return Basis(line.get("data", shards), f"{line.get('images', 'the')} images of {shards}")


def _tested(line: dict[str, Any], options: dict[str, Any]) -> Basis:
    """What an evaluation learned from and was tested on; old logs name shards alone."""
    key, text = [], []
    for name, what in (("val", ""), ("train", ", learned from ")):
        shards = " ".join(options.get(name, []))
        images = line.get(f"{name}_images", "the")
        key.append(line.get(f"{name}_data", f"{images} {shards}"))
        text.append(f"{what}{images} images of {shards}")
    # What decides neither which images there are nor what is measured of them.
    aside = {"train", "val", "batch_size", "seed"}
    for name, value in sorted(options.items()):
        if name not in aside:
            text.append(f", --{name.replace('_', '-')} {json.dumps(value)}")
    return Basis(" ".join(key + text[2:]), "".join(text))
