"""Checkpoints of a run: written whole or not at all, the last few kept."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from famt.mae import MODELS, MaskedAutoencoder

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")
_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after `step` optimiser steps.

    Attributes:
        step: optimiser steps done.
        model_name: key of `famt.mae.MODELS`.
        model: weights of the `MaskedAutoencoder`.
        optimizer: the optimiser's state.
        loaders: each rank's loader state.
        generators: each rank's sampling generator state.
        config: the run's configuration, spelled out.
    """

    step: int
    model_name: str
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    loaders: list[dict[str, object]]
    generators: list[Tensor]
    config: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` and remove all but the last two.

    The file appears under its name only when it is complete and on disk.

    Raises:
        OSError: the disk is full, say; earlier checkpoints are untouched.
    """
    path = folder / f"checkpoint-{checkpoint.step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(vars(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path}: could not be written, earlier checkpoints stand ({error})"
        ) from error
    for old in _all(folder)[:-_KEEP]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the latest one of a run's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of this program.
    """
    if path.is_dir():
        found = latest(path)
        if found is None:
            raise FileNotFoundError(f"{path} holds no checkpoint-*.pt; train one first")
        path = found
    try:
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, EOFError, LookupError, UnpicklingError) as error:
        raise ValueError(f"{path} is no whole checkpoint of this program: {error}") from error


def load_model(path: Path) -> MaskedAutoencoder:
    """The model of a checkpoint file or run folder, in eval mode."""
    checkpoint = load(path)
    model = MaskedAutoencoder(MODELS[checkpoint.model_name])
    model.load_state_dict(checkpoint.model)
    return model.eval()


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))
