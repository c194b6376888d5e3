"""Writes what a run reports: a log of JSON lines, curves in trackers, a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from famt.pipeline.progress import progress_bar
from famt.train.run_folder import BusyError, own_folder, written_whole
from famt.train.run_log import read_lines
from famt.train.timing import Clock
from famt.train.trackers import Board, TensorBoard, Tracked, open_tracker

# A run says how long it will take after so many steps, or so much time.
_TIMED_STEPS, _TIMED_SECONDS = 20, 60.0


class Log:
    """Log of a run's main rank.

    `log.jsonl` has a line for each log point and each event. A resumed run drops the lines after
    the step it resumes from, so the log of an interrupted run reads like that of any other.

    Args:
        folder: of the run.
        step: optimiser steps done so far.
        total_steps: of the whole run.
        images_per_step: over all ranks.
        clock: times of the stages, read at every log point.
        name: of the progress bar.
        tracked: the run, for a tracker beside TensorBoard.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        total_steps: int,
        images_per_step: int,
        clock: Clock,
        name: str,
        tracked: Tracked | None = None,
    ) -> None:
        self._folder, path = folder, folder / "log.jsonl"
        self._images_per_step = images_per_step
        self._clock = clock
        if path.exists():
            kept = (line for line in read_lines(folder)[0] if line["step"] <= step)
            with written_whole(path) as file:
                file.writelines(f"{json.dumps(line)}\n".encode() for line in kept)
        # Entries at this very step stay valid: evaluations, the last loss.
        self._boards: list[Board] = [TensorBoard(folder, purge_step=step + 1)]
        if tracked:
            self._boards += open_tracker(folder, tracked)
        self._bar = progress_bar(total=total_steps, initial=step, desc=name, unit="step")
        self._since, self._steps = time.perf_counter(), 0
        self._first: float | None = None  # when the first step was done
        self._timed = 0  # steps since then, until the end is foretold

    def step(self) -> None:
        """Count an optimiser step; once, print how long the others will take."""
        self._steps += 1
        self._bar.update()
        now = time.perf_counter()
        if self._first is None:  # what is compiled or opened at first takes no time later
            self._first = now
        elif self._timed >= 0:
            self._timed += 1
            if self._timed >= _TIMED_STEPS or now - self._first >= _TIMED_SECONDS:
                seconds = (now - self._first) / self._timed
                left = self._bar.total - self._bar.n
                if left:
                    told = (
                        f"about {_duration(seconds * left)} to go at this rate, refreshes and "
                        f"evaluations not counted: {left} steps of {seconds:.3g} s"
                    )
                    tqdm.write(told, file=sys.stderr)
                self._timed = -1

    def point(self, step: int, epoch: int, scalars: dict[str, float]) -> None:
        """Log scalars, images/s and each stage's share of the time since the last point."""
        now = time.perf_counter()
        seconds = now - self._since
        stages = self._clock.read()
        rate = self._steps * self._images_per_step / seconds
        shares = {f"time/{name}": spent / seconds for name, spent in stages.items()}
        everything = {**scalars, "images_per_second": rate, **shares}
        self._draw(everything, step)
        _append(self._folder, {"step": step, "epoch": epoch, **everything})
        self._bar.set_postfix_str(
            f"loss {scalars['loss']:.4f}, {rate:.0f} images/s, "
            f"{shares.get('time/data_wait', 0):.0%} waiting for data",
            refresh=False,
        )
        self._since, self._steps = now, 0

    def event(self, step: int, name: str, *, tell: bool = False, **details: object) -> None:
        """Log an event, such as a checkpoint; with `tell`, print it too."""
        write_event(self._folder, step, name, **details)
        if tell:
            text = ", ".join(f"{key} {value}" for key, value in details.items())
            tqdm.write(f"step {step}: {name}: {text}", file=sys.stderr)

    def found(self, step: int, evaluator: str, values: dict[str, float], **data: int | str) -> None:
        """Log the result of an evaluation during training, and its data."""
        self._draw({f"{evaluator}/{name}": value for name, value in values.items()}, step)
        write_event(self._folder, step, "evaluation", evaluator=evaluator, **data, **values)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Log a picture of a few crops."""
        for board in self._boards:
            board.picture("crops", picture, step)

    def end_bar(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def close(self) -> None:
        """End the progress bar and close TensorBoard and the tracker."""
        self.end_bar()
        for board in self._boards:
            board.close()

    def _draw(self, values: Mapping[str, float], step: int) -> None:
        for board in self._boards:
            board.scalars(values, step)


def _duration(seconds: float) -> str:
    """The two largest units of a time: 3 h 20 min."""
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{days} d {hours % 24} h" if days else f"{hours} h {minutes % 60} min"


def write_event(folder: Path, step: int, name: str, **details: object) -> None:
    """Add an event to the log of a run."""
    _append(folder, {"step": step, "event": name, **details})


def rounded(line: Mapping[str, object]) -> dict[str, object]:
    """A line with its numbers rounded to six digits."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in line.items()
    }


_WORDS = {
    "top1": "top-1", "held_out_top1": "top-1, held out", "miou": "mean IoU", "iou": "IoU",
    "cls": "class token", "mean": "mean of patches", "attentive": "attentive pooling",
}  # fmt: skip
_SHARES = ("top1", "held_out_top1", "miou", "iou", "pixel_accuracy")


def evaluation_table(line: Mapping[str, object], classes: int) -> str:
    """A result as `--json` prints it, as text: shares in percent, with binomial standard errors,
    and the share that a guess among the classes has right."""
    rows = []
    for name, value in line.items():
        kind = next((each for each in _SHARES if name.startswith(each)), None)
        if kind and isinstance(value, float):
            error = line.get(name.replace("top1", "stderr")) if kind == "top1" else None
            end = f" ± {100 * error:.1f} %" if isinstance(error, float) else " %"
            place = name.removeprefix(kind).strip("_")
            label = ", ".join(_WORDS.get(each, each) for each in (kind, place) if each)
            rows.append((label, f"{100 * value:5.1f}{end}"))
        elif not name.startswith(("stderr", "train_", "val_")) and name not in _ABOUT:
            stem, _, place = name.rpartition("_")
            label = f"{stem}, {_WORDS[place]}" if place in _WORDS else name
            rows.append((label.replace("_", " "), f"{value}"))
    trained = "step" in line and line["weights"] != "untrained"
    step = f", step {line['step']}" if trained else ""
    head = f"{line['evaluate']} of {line['checkpoint']} ({line['weights']} weights{step})"
    images = f"{line['val_images']} images to test on, {line['train_images']} to learn from"
    if any(name.startswith("top1") for name in line):
        rows.append((f"chance, {classes} classes", f"{100 / classes:5.1f} %"))
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join([head, images, *(f"  {label:{width}}  {value}" for label, value in rows)])


_ABOUT = {"evaluate", "checkpoint", "weights", "step"}


def _append(folder: Path, line: dict[str, object]) -> None:
    path = folder / "log.jsonl"
    try:
        with open(path, "ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # a kill cut off the last line; start a new one
            text = json.dumps({"time": round(time.time(), 1), **rounded(line)}, default=str)
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from error


def log_evaluation(
    folder: Path,
    step: int,
    name: str,
    weights: str,
    values: dict[str, float | int | str],
    options: dict[str, Any],
) -> None:
    """Add an evaluation's result to the log and the curves of a run, which may be training.

    TensorBoard always gets it; the run's other tracker does unless the run is training now, since
    W&B takes one writer at a time.

    Args:
        folder: of the run.
        step: of the checkpoint.
        name: of the evaluator.
        weights: trained, ema or untrained.
        values: the result; numbers become curves `<name>/<value>`, or `<name>_<weights>/<value>` if
            the weights are not the trained ones.
        options: what else it depends on; see `famt.train.evaluate.evaluation`.
    """
    about = {"evaluator": name, "weights": weights, "options": options}
    write_event(folder, step, "evaluation", **about, **values)
    curve = name if weights == "trained" else f"{name}_{weights}"
    numbers = {
        f"{curve}/{value}": number
        for value, number in values.items()
        if not isinstance(number, str)
    }
    board = TensorBoard(folder, filename_suffix=".evaluation")
    board.scalars(numbers, step)
    board.close()
    starts = [line for line in read_lines(folder)[0] if line.get("event") == "start"]
    asked = starts[-1]["options"] if starts else {}
    if asked.get("track", "tensorboard") != "tensorboard":
        tracked = Tracked(asked["track"], starts[-1]["run"], asked)
        with suppress(BusyError), own_folder(folder):
            for each in open_tracker(folder, tracked):
                each.scalars(numbers, step)
                each.close()
