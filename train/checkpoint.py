"""Checkpoints of a run: written whole or not at all, the last few kept."""

from __future__ import annotations

import errno
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.models import ModelConfig
from famt.pipeline.errors import UserError
from famt.pipeline.storage import reason
from famt.train.files import written_whole
from famt.train.signals.config import AttentionConfig, FrequencyConfig

FORMAT = 1
"""version of the files here; raise it where one of before can't be gone on from exactly"""

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")

CLASSIFIER = "classifier"
"""method of fine-tuning runs: an encoder with a classifier, no pre-training model"""


class DamagedError(UserError):
    """A file whose bytes are not those that were written."""


class FormatError(UserError):
    """A file of another `FORMAT`."""


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after `step` optimiser steps.

    Attributes:
        run: id of the run.
        step: optimiser steps done; it only grows.
        schedule_start: step that the learning rate's schedule counts from; not 0 after an elastic
            restart, which lays it out anew.
        epoch: whole epochs done.
        method: key of `famt.methods.METHODS`, or `CLASSIFIER`.
        sizes: fields of the `famt.models.ModelConfig` that the model is built from.
        model: its weights.
        ema: the averaged weights of its encoder, if the run keeps them.
        optimizer: the optimiser's state.
        signals: state of each signal, by its slot.
        ranks: state of what each rank has alone: its loader, and its generator of samples.
        config: the run's options and circumstances, spelled out.
    """

    run: str
    step: int
    schedule_start: int
    epoch: int
    method: str
    sizes: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    signals: dict[str, dict[str, Any]]
    ranks: list[dict[str, Any]]
    config: dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """An encoder at a moment of a run; attributes as in `Checkpoint`, and what to make of it.

    Attributes:
        kinds: model scores that are wanted.
        urls: tars to make them of, in the order of the run's rows; None for those of its patterns.
    """

    run: str
    step: int
    sizes: dict[str, Any]
    weights: dict[str, Tensor]
    config: dict[str, Any]
    kinds: list[str]
    urls: list[str] | None = None

    def build(self) -> VisionTransformer:
        """The encoder, in eval mode."""
        encoder = ModelConfig(**self.sizes).encoder()
        encoder.load_state_dict(self.weights)
        return encoder.eval()


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` and remove all but the last `keep`.

    The file appears under its name only when it is complete and on disk.

    Raises:
        OSError: the disk is full, say; earlier checkpoints are untouched.
    """
    path = folder / f"checkpoint-{checkpoint.step:08d}.pt"
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **vars(checkpoint)}, file)
    for old in files(folder)[:-keep]:
        old.unlink()
    return path


def save_encoder(path: Path, encoder: Encoder) -> None:
    """Write an encoder's weights for the refresh job.

    Raises:
        OSError: the disk is full, say.
    """
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **vars(encoder)}, file)


def load_encoder(path: Path) -> Encoder:
    """The encoder of a checkpoint, of a run's latest one, or of a file that `save_encoder` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is neither, or of fine-tuning.
    """
    if path.is_dir() or _NAME.fullmatch(path.name):
        state = _load_pretrained(path)
        prefix = "encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in state.model.items()
            if name.startswith(prefix)
        }
        frequency, attention = state.config["frequency"], state.config["attention"]
        slots = FrequencyConfig(**frequency), AttentionConfig(**attention)
        kinds = [each.kind for each in slots if each.is_refreshed]
        return Encoder(state.run, state.step, state.sizes, weights, state.config, kinds)
    try:
        return Encoder(**_read(path))
    except TypeError:
        raise UserError(f"{path} is neither a checkpoint nor an encoder left for refresh") from None


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None."""
    found = files(folder)
    return found[-1] if found else None


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Read a checkpoint file, or the latest one of a run's folder.

    Args:
        path: of the file or folder.
        verified: its checksums were compared just now.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged (`DamagedError`), of another format (`FormatError`), or no
            checkpoint of this program.
    """
    if path.is_dir():
        found = latest(path)
        if found is None:
            raise FileNotFoundError(f"{path} holds no checkpoint-*.pt; train one first")
        path = found
    try:
        return Checkpoint(**_read(path, verified=verified))
    except FormatError:
        raise
    except (TypeError, ValueError) as error:
        earlier = [each for each in files(path.parent) if each < path]
        remedy = f"; remove it to go on from {earlier[-1].name}" if earlier else ""
        kind = DamagedError if isinstance(error, DamagedError) else UserError
        raise kind(f"{path} is no whole checkpoint of this program{remedy}") from error


def load_model(path: Path, *, ema: bool = False) -> MaskedModel:
    """The model of a checkpoint file or run folder, in eval mode.

    Args:
        ema: with the averaged weights of the encoder.
    """
    checkpoint = _load_pretrained(path)
    model = METHODS[checkpoint.method](ModelConfig(**checkpoint.sizes))
    model.load_state_dict(checkpoint.model)
    if ema:
        if checkpoint.ema is None:
            raise UserError(f"{path} keeps no averaged weights; train with --optimiser.ema-decay")
        model.encoder.load_state_dict(checkpoint.ema)
    return model.eval()


def _load_pretrained(path: Path) -> Checkpoint:
    checkpoint = load(path)
    if checkpoint.method not in METHODS:
        raise UserError(f"{path} is of fine-tuning; give the run that was pre-trained")
    return checkpoint


def _read(path: Path, *, verified: bool = False) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not verified and (damage := damage_of(path)):
        raise DamagedError(f"{path} is damaged: {damage}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, TypeError, EOFError, LookupError, UnpicklingError) as error:
        raise UserError(f"{path} is no whole file of this program: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no file of this program")
    written = content.pop("format", 1)  # the first files did not name it
    if written != FORMAT:
        raise FormatError(
            f"{path} has format {written}, and this version of the program reads format {FORMAT}; "
            "use it with the version that wrote it, or train anew in another --out"
        )
    return content


def damage_of(path: Path) -> str | None:
    """What speaks against a file's bytes by its own checksums, or None.

    `torch.save` writes a zip with a CRC-32 for each tensor, and `torch.load` does not look at them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
            return f"the checksum of {record} is another" if record else None
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):  # a bad sector; a position that can't be
            return reason(error)
        raise
    except Exception as error:  # zipfile raises a dozen kinds on damaged headers
        return reason(error)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, the earliest first."""
    return [step_of(path) for path in files(folder)]


def files(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, the earliest first."""
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.stem.removeprefix("checkpoint-"))
