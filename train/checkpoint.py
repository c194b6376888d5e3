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

from famt.mae import MODELS, Decoder, MaskedAutoencoder
from train.config import Pretrain

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")

# What may differ between a run and its continuation: nothing that is learned depends on it...
_FREE = {
    "out", "cache", "shards", "threads", "compile", "checkpoint_minutes", "keep_checkpoints",
    "picture_epochs", "resume", "elastic",
}  # fmt: skip
# ... and what may with --elastic, from the beginning of an epoch.
_ELASTIC = {"data", "spec", "world_size", "batch_size", "accumulate", "log_steps"}


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after `step` optimiser steps.

    Attributes:
        step: optimiser steps done.
        epoch: whole epochs done.
        model_name, decoder: arguments of the `MaskedAutoencoder`.
        model: its weights.
        ema: the averaged weights of its encoder, if the run keeps them.
        optimizer: the optimiser's state.
        loaders: each rank's loader state.
        generators: each rank's sampling generator state.
        bank: content of the attention bank, if the run has one.
        config: the run's options and circumstances, spelled out.
    """

    step: int
    epoch: int
    model_name: str
    decoder: Decoder
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    loaders: list[dict[str, object]]
    generators: list[Tensor]
    bank: dict[str, Tensor] | None
    config: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` and remove all but the last `keep`.

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
    for old in _all(folder)[:-keep]:
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
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, TypeError, EOFError, LookupError, UnpicklingError) as error:
        raise ValueError(f"{path} is no whole checkpoint of this program: {error}") from error


def load_model(path: Path, *, ema: bool = False) -> MaskedAutoencoder:
    """The model of a checkpoint file or run folder, in eval mode.

    Args:
        ema: with the averaged weights of the encoder.
    """
    checkpoint = load(path)
    model = MaskedAutoencoder(MODELS[checkpoint.model_name], checkpoint.decoder)
    model.load_state_dict(checkpoint.model)
    if ema:
        if checkpoint.ema is None:
            raise ValueError(f"{path} keeps no averaged weights; train with --optimiser.ema-decay")
        model.encoder.load_state_dict(checkpoint.ema)
    return model.eval()


def resume(config: Pretrain, circumstances: dict[str, object]) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that a run goes on from, if there is one, and whether with the next batch.

    Args:
        config: of the run now.
        circumstances: what else must be as it was: device, world size, data.

    Returns:
        the checkpoint or None, and False if it must go back to the beginning of the epoch.

    Raises:
        ValueError: the folder's run is another one, or may not be gone on with.
    """
    found = latest(config.out)
    if found is None:
        return None, True
    if config.resume == "never":
        raise ValueError(f"{found} is there; --resume never wants a folder without checkpoints")
    resumed = load(found)
    then, now = resumed.config, {**config.describe(), **circumstances}
    changed = {name for name in now if name not in _FREE and then.get(name) != now[name]}
    if not changed or (config.elastic and changed <= _ELASTIC):
        return resumed, not changed
    differences = "; ".join(f"{each}: {then.get(each)} -> {now[each]}" for each in sorted(changed))
    remedy = "use the same, or another --out"
    if changed <= _ELASTIC:
        remedy += ", or --elastic to go on from the beginning of the epoch"
    raise ValueError(f"{found} belongs to a run with other options ({differences}); {remedy}")


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))
