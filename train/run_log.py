"""Reads a run's log back: losses, evaluations, stages, options and pictures.

It needs nothing but the log and the TensorBoard events, so it works while the run trains, and for
copied folders.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
        epoch: passes over the data done, fractional.
        seconds: of training so far, without interruptions.
        loss: mean since the last log point.
    """

    step: int
    epoch: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class Basis:
    """What a result was measured on; only results on the same basis compare.

    Attributes:
        key: identifies images and options, wherever the images lie.
        text: for display.
        tested: the images tested on, for display in short.
    """

    key: str
    text: str = field(compare=False)
    tested: str = field(compare=False)


@dataclass(frozen=True)
class Found:
    """A result of an evaluator or of the monitor at a step; `options` as in
    `famt.train.evaluate.evaluation.Evaluation.conditions`."""

    step: int
    epoch: float
    evaluator: str
    weights: str
    values: dict[str, Any]
    options: dict[str, Any]
    basis: Basis


@dataclass
class History:
    """A run, read from its log.

    Attributes:
        folder: of the run.
        corrupt: number of unreadable lines in the log, which are skipped.
        options: of its last start, `section.option` -> value.
        points: log points, in order.
        found: results of evaluations, in the order they were logged.
        total_steps: of the whole run.
        finished: whether all steps are done and the last checkpoint is written.
        images: trained on; by old logs, without the last, incomplete batch of an epoch.
        data: digest of the training images, if the log has it.
    """

    folder: Path
    corrupt: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    total_steps: int = 0
    finished: bool = False
    images: int = 0
    data: str | None = None
    _batch: int = 0
    _steps_per_epoch: int = 1
    _from_step: int = 0  # where epoch 0 starts
    _spent: dict[str, float] = field(default_factory=dict)  # seconds by stage

    @property
    def stages(self) -> dict[str, float]:
        """Stage -> share of the training time; the sum is at most 1."""
        seconds = max(self.points[-1].seconds, 1e-9)
        stages = {name: each / seconds for name, each in self._spent.items()}
        return {**stages, NO_STAGE: max(0.0, 1 - sum(stages.values()))}

    def seconds(self, step: int) -> float:
        """Training time up to a step, at an even pace between log points."""
        known = [Point(0, 0.0, 0.0, 0.0), *self.points]
        steps, seconds = [each.step for each in known], [each.seconds for each in known]
        return float(np.interp(step, steps, seconds))

    def take(self, line: dict[str, Any]) -> None:
        """Take the next line of the log.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the line is garbled.
        """
        event = line.get("event")
        if event == "start":
            self._begin(line)
        elif event == "evaluation":
            self.found.append(self._found(line))
        elif event is None:
            self._advance(line)
        self.finished |= event == "finished"

    def _begin(self, line: dict[str, Any]) -> None:
        batch, an_epoch, total = (
            int(line[each]) for each in ("effective_batch", "steps_per_epoch", "total_steps")
        )
        options = flat(line["options"])
        # The schedule starts at step 0, or where an elastic restart laid it out again.
        self._from_step = total - options["epochs"] * an_epoch
        self._batch, self._steps_per_epoch, self.total_steps = batch, an_epoch, total
        self.options, self.data = options, line.get("data")
        crops = [value for name, value in options.items() if name.endswith("crops_per_image")]
        self.images = line.get("images") or an_epoch * batch // (crops[0] if crops else 1)

    def _advance(self, line: dict[str, Any]) -> None:
        step, last = line["step"], self.points[-1] if self.points else Point(0, 0.0, 0.0, 0.0)
        images = (step - last.step) * self._batch
        seconds = images / max(line["images_per_second"], 1e-9)
        loss = float(line["loss"])
        spent = {
            name.removeprefix("time/"): float(share) * seconds
            for name, share in line.items()
            if name.startswith("time/")
        }
        self.points.append(Point(step, self._epoch(step), last.seconds + seconds, loss))
        for stage, each in spent.items():
            self._spent[stage] = self._spent.get(stage, 0.0) + each

    def _epoch(self, step: int) -> float:
        return (step - self._from_step) / self._steps_per_epoch

    def _found(self, line: dict[str, Any]) -> Found:
        about = {"time", "step", "event", "evaluator", "weights", "options"}
        values = {name: value for name, value in line.items() if name not in about}
        options, evaluator = line.get("options", {}), line["evaluator"]
        basis = self._watched(line) if evaluator == "monitor" else _tested(line, options)
        weights = line.get("weights", "trained")
        step = line["step"]
        return Found(step, self._epoch(step), evaluator, weights, values, options, basis)

    def _watched(self, line: dict[str, Any]) -> Basis:
        """Images of the monitor; old logs only have their patterns."""
        shards, images = self.options.get("monitor") or [], line.get("images", "the")
        text = f"{_count(images)} images of {' '.join(shards)}"
        tested = f"a fifth of {images_of(images, shards)}"
        return Basis(line.get("data", " ".join(shards)), text, tested)


def read(folder: Path) -> History:
    """Read the log of a run, which may be training.

    Raises:
        UserError: the folder holds no run, or one without a log point.
    """
    return parse(folder, *read_lines(folder))


def read_lines(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's log, and the number of unreadable ones.

    Raises:
        UserError: the folder holds no run.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run: it has no {path.name}; give the --out of a training"
        )
    *texts, unfinished = path.read_text(errors="replace").split("\n")
    lines, corrupt = [], 0
    for text in (*texts, unfinished) if unfinished.endswith("}") else texts:
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
            lines.append(line)
        except (ValueError, KeyError, TypeError):  # garbled by a kill or a disk
            corrupt += 1
    return lines, corrupt


def parse(folder: Path, lines: Iterable[dict[str, Any]], corrupt: int = 0) -> History:
    """Interpret the lines of a log.

    Args:
        folder: of the run, for messages and reports; need not exist.
        lines: of the log.
        corrupt: number of unreadable lines.

    Raises:
        UserError: they have no start of a run, or no log point.
    """
    history = History(folder, corrupt)
    for line in lines:
        try:
            history.take(line)
        except (ValueError, KeyError, TypeError, AttributeError):  # garbled, but still JSON
            history.corrupt += 1
    if not history.options:
        raise UserError(f"{folder}: the log has no start of a run")
    if not history.points:
        raise UserError(f"{folder}: the run has not reached its first log point")
    return history


def pictures(folder: Path, most: int) -> list[tuple[int, Image.Image]]:
    """The run's pictures of crops, each with its step: the first, the last and others evenly
    between, `most` at most."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    if "crops" not in events.Tags()["images"]:
        return []
    drawn = {event.step: event.encoded_image_string for event in events.Images("crops")}
    steps = sorted(drawn)
    if len(steps) > most:
        steps = [steps[round(n * (len(steps) - 1) / max(most - 1, 1))] for n in range(most)]
    return [(step, Image.open(io.BytesIO(drawn[step])).convert("RGB")) for step in steps]


def images_of(count: int | str, patterns: Iterable[str]) -> str:
    """A number of images and what their shards are called: `2,000 images of val`."""
    names = (each.rstrip("/").rpartition("/")[2] for each in patterns)
    short = dict.fromkeys(re.sub(r"[-_.]?\d*[*?[{].*", "", each) or each for each in names)
    return f"{_count(count)} images" + (f" of {' '.join(short)}" if short else "")


def _count(images: int | str) -> str:
    return f"{images:,}" if isinstance(images, int) else images


def _tested(line: dict[str, Any], options: dict[str, Any]) -> Basis:
    """Training and test images of an evaluation; old logs only have their patterns."""
    key, text = [], []
    for name, what in (("val", ""), ("train", ", learned from ")):
        shards = " ".join(options.get(name, []))
        images = line.get(f"{name}_images", "the")
        key.append(line.get(f"{name}_data", f"{images} {shards}"))
        text.append(f"{what}{_count(images)} images of {shards}")
    # These change neither the images nor what is measured.
    aside = {"train", "val", "batch_size", "seed"}
    for name, value in sorted(options.items()):
        if name not in aside:
            shown = " ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
            text.append(f", --{name.replace('_', '-')} {shown}")
    tested = images_of(line.get("val_images", "the"), options.get("val", []))
    return Basis(" ".join(key + text[2:]), "".join(text), tested)
