"""Where the curves and pictures of a run go: TensorBoard, and one other tracker beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from famt.pipeline.errors import UserError
from famt.pipeline.options import flat

_LONGEST = 500  # characters of a parameter that every MLflow server stores


class Board(Protocol):
    """Takes scalars and pictures of a run by name and step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def picture(self, name: str, picture: Image.Image, step: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker knows it.

    Attributes:
        tracker: value of `--track`.
        run: id of the run; a resumed run has the same.
        options: of the run, as plain data.
    """

    tracker: str
    run: str
    options: dict[str, Any]


def require(tracker: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        UserError: it is not; names the command that installs it.
    """
    if tracker != "tensorboard" and find_spec(tracker) is None:
        raise UserError(
            f"--track {tracker}: its package is not installed; pip install 'famt[{tracker}]'"
        )


def open_tracker(folder: Path, tracked: Tracked) -> list[Board]:
    """The tracker beside TensorBoard of the run in a folder, if it has one."""
    kinds: dict[str, Callable[[Path, Tracked], Board]] = {"wandb": WandB, "mlflow": MLflow}
    kind = kinds.get(tracked.tracker)
    return [Tolerant(tracked.tracker, lambda: kind(folder, tracked))] if kind else []


class TensorBoard:
    """Event files in a run's folder; arguments as for torch's `SummaryWriter`."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._writer = SummaryWriter(str(folder), **options)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. WANDB_PROJECT, WANDB_MODE and its other variables hold."""

    def __init__(self, folder: Path, tracked: Tracked) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "famt"),
            id=tracked.run,
            resume="allow",
            name=folder.name,
            dir=folder,
            config=tracked.options,
        )
        # A resumed run may go back some steps, which the tracker's own counter of steps can't.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._image(picture), "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables hold."""

    def __init__(self, folder: Path, tracked: Tracked) -> None:
        import mlflow

        self._mlflow = mlflow
        known = mlflow.search_runs(
            filter_string=f"tags.`famt.run` = '{tracked.run}'", max_results=1, output_format="list"
        )
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
        else:
            mlflow.start_run(run_name=folder.name, tags={"famt.run": tracked.run})
            options = flat(tracked.options).items()
            mlflow.log_params({name: str(value)[:_LONGEST] for name, value in options})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._mlflow.log_image(picture, key=name, step=step, synchronous=True)

    def close(self) -> None:
        self._mlflow.end_run()


class Tolerant:
    """The tracker `name`, dropped with a warning at its first failure; training goes on."""

    def __init__(self, name: str, open_board: Callable[[], Board]) -> None:
        self._name = name
        self._board: Board | None = self._try(open_board)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._board:
            self._try(self._board.scalars, values, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        if self._board:
            self._try(self._board.picture, name, picture, step)

    def close(self) -> None:
        if self._board:
            self._try(self._board.close)

    def _try(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            self._board = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"warning: {self._name} failed and gets nothing more of this run until it is "
                f"resumed; TensorBoard goes on ({reason})",
                file=sys.stderr,
            )
            return None
