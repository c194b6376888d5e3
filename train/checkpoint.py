"""Checkpoints: how a run's state is written, read back, and resumed."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.models import ModelConfig
from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, Since, annotated, flat
from famt.pipeline.storage import reason
from famt.train.config import TrainingOptions
from famt.train.distributed import SEEN_WITHIN, Ranks
from famt.train.log import write_event
from famt.train.run_folder import written_whole

FORMAT = 3
"""Version of the files; raise it when older ones can no longer be resumed exactly."""

CLASSIFIER = "classifier"
"""`method` of fine-tuning runs, whose model is an encoder with a classifier."""

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")

# Circumstances that may change at the start of an epoch, like `ELASTIC` options.
_ELASTIC_CIRCUMSTANCES = ("data", "world_size")


class Component(Protocol):
    """A part of a run that owns its state, as torch's modules and optimisers do."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> object: ...


@runtime_checkable
class Elastic(Component, Protocol):
    """A component that can resume with changed options, at the start of an epoch."""

    def restart(self, state: dict[str, Any], epoch: int) -> None: ...


class FormatError(UserError):
    """A file of another `FORMAT`."""


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after `step` optimiser steps.

    Attributes:
        run: id of the run.
        step: optimiser steps done; never decreases.
        epoch: whole epochs done.
        method: key of `famt.methods.METHODS`, or `CLASSIFIER`.
        sizes: fields of the model's `famt.models.ModelConfig`.
        components: state of each component by name: model, optimisation, and signals by slot.
        ranks: state of each rank's own components, by name.
        config: the run's options and circumstances as plain data.
    """

    run: str
    step: int
    epoch: int
    method: str
    sizes: dict[str, Any]
    components: dict[str, dict[str, Any]]
    ranks: list[dict[str, dict[str, Any]]]
    config: dict[str, Any]

    @property
    def model(self) -> dict[str, Tensor]:
        """The model's weights."""
        return self.components["model"]

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """Averaged weights, if the run keeps them: the encoder's, or in fine-tuning the model's."""
        return self.components["optimisation"]["ema"]

    @property
    def progress(self) -> float:
        """Share of the run done, in [0, 1]."""
        return float(self.components["optimisation"]["progress"])


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` atomically, then remove all but the last `keep`.

    Raises:
        OSError: writing failed, for example on a full disk; earlier checkpoints are untouched.
    """
    path = folder / f"checkpoint-{checkpoint.step:08d}.pt"
    write(path, checkpoint)
    for old in files(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The last checkpoint in a run's folder, or None."""
    return next(reversed(files(folder)), None)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the last one in a run's folder.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file is damaged, of another format (`FormatError`), or no checkpoint of this
            program.
    """
    if path.is_dir():
        if not (found := latest(path)):
            if (path / "config.json").is_file():
                raise UserError(f"{path} is an exported encoder; give the run that it comes from")
            raise FileNotFoundError(f"{path} holds no checkpoint-*.pt; train one first")
        path = found
    try:
        return Checkpoint(**read(path))
    except FormatError:
        raise
    except (TypeError, ValueError, UserError) as error:
        earlier = [each for each in files(path.parent) if each < path]
        remedy = f"; remove it to resume from {earlier[-1].name}" if earlier else ""
        raise UserError(f"{path} is not a whole checkpoint of this program{remedy}") from error


def load_model(path: Path, *, ema: bool = False) -> MaskedModel:
    """The model of a pre-training checkpoint or run, in eval mode; `ema` takes the encoder's
    averaged weights."""
    checkpoint = load_pretrained(path)
    model = METHODS[checkpoint.method](ModelConfig(**checkpoint.sizes))
    model.load_state_dict(checkpoint.model)
    if ema:
        model.encoder.load_state_dict(_averaged(checkpoint, path))
    return model.eval()


def _averaged(checkpoint: Checkpoint, path: Path) -> dict[str, Tensor]:
    if checkpoint.ema is None:
        raise UserError(f"{path} keeps no averaged weights; train with --optimiser.ema-decay")
    return checkpoint.ema


def is_finetuned(source: str | Path) -> bool:
    """Whether a source is the folder or a checkpoint of a fine-tuning run."""
    path = Path(source)
    of_run = is_checkpoint(path) if path.is_file() else latest(path) is not None
    return of_run and load(path).method == CLASSIFIER


def load_classifier(path: Path, *, ema: bool = False) -> VisionTransformer:
    """Encoder and head of a fine-tuning checkpoint or run, in eval mode; `ema` takes the
    averaged weights."""
    checkpoint = load(path)
    weights = _averaged(checkpoint, path) if ema else checkpoint.model
    mean = "fc_norm.weight" in weights
    model = ModelConfig(**checkpoint.sizes).build(
        num_classes=len(weights["head.bias"]),
        global_pool="avg" if mean else "token",
        fc_norm=mean,
    )
    model.load_state_dict(weights)
    return model.eval()


def load_pretrained(path: Path) -> Checkpoint:
    """As `load`; refuses checkpoints of fine-tuning."""
    checkpoint = load(path)
    if checkpoint.method not in METHODS:
        raise UserError(f"{path} is a fine-tuning run; give a pre-training run")
    return checkpoint


def write(path: Path, content: Any) -> None:
    """Write the fields of a dataclass as a file that `read` takes."""
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **vars(content)}, file)


def read(path: Path) -> dict[str, Any]:
    """Read a file that `write` wrote, after comparing its checksums.

    Raises:
        FileNotFoundError: there is none.
        UserError: see `load`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if damage := damage_of(path):
        raise UserError(f"{path} is damaged: {damage}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, TypeError, EOFError, LookupError, UnpicklingError) as error:
        raise UserError(f"{path} can't be read: {reason(error)}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} was not written by this program")
    written = content.pop("format")
    if written != FORMAT:
        raise FormatError(
            f"{path} has format {written}, but this version reads format {FORMAT}; use the version "
            "that wrote it, or train from scratch in another --out"
        )
    return content


def damage_of(path: Path) -> str | None:
    """Compare a file with its checksums; says what is damaged, or None.

    `torch.save` writes a zip with a CRC-32 for each tensor, which `torch.load` ignores.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
            return f"wrong checksum of {record}" if record else None
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):  # a bad sector; an impossible offset
            return reason(error)
        raise
    except Exception as error:  # zipfile raises a dozen kinds on damaged headers
        return reason(error)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, in order."""
    return [step_of(path) for path in files(folder)]


def files(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, in order."""
    return sorted(filter(is_checkpoint, folder.glob("checkpoint-*.pt")))


def is_checkpoint(path: Path) -> bool:
    """Whether a path has a checkpoint's name."""
    return bool(_NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("checkpoint-"))


def resume(
    config: TrainingOptions,
    circumstances: dict[str, object],
    ranks: Ranks,
    lost: Callable[[Checkpoint], list[Path]] = lambda _: [],
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to resume from, if there is one, and whether the run resumes exactly.

    Every rank calls this. The main rank chooses the last undamaged checkpoint; the others wait
    until they see it.

    Args:
        config: options of the run now.
        circumstances: what else must not have changed: device, world size, data.
        ranks: this rank among those of the run.
        lost: lists files that an exact resume of a checkpoint needs but that are gone; only the
            main rank calls it.

    Returns:
        the checkpoint or None; True to resume with the very next batch, False to go back to the
        start of the epoch.

    Raises:
        UserError: the folder holds another run, or resuming is not allowed; all of its checkpoints
            are damaged; or a machine does not see the folder.
    """
    chosen = ranks.from_main(lambda: _choose(config.out))
    found = chosen and config.out / chosen.name  # each machine looks in its own --out
    _wait_to_see(found or config.out / "lock", ranks)
    if found is None:
        return None, True
    if config.resume == "never":
        raise UserError(f"{found} exists, and --resume never refuses folders with checkpoints")
    resumed = load(found)
    changes, harmless = _changes(resumed, config, circumstances)
    if config.elastic and changes and harmless:
        return resumed, False
    if not changes:
        gone = ranks.from_main(lambda: lost(resumed))
        if gone and not config.elastic:
            raise UserError(
                f"{found} can't be resumed exactly without {', '.join(map(str, gone))}; --elastic "
                "resumes from the start of the epoch with what is there"
            )
        return resumed, not gone
    remedy = "use the same options, or another --out"
    if harmless:
        remedy += ", or --elastic to resume from the start of the epoch"
    raise UserError(f"{found} belongs to a run with other options ({'; '.join(changes)}); {remedy}")


def _changes(
    resumed: Checkpoint, config: TrainingOptions, circumstances: dict[str, Any]
) -> tuple[list[str], bool]:
    """What differs from the checkpoint and may not, except perhaps with --elastic.

    Returns:
        each such option or circumstance, with both values, and whether --elastic allows them all.
    """
    notes = {name: beside for name, _, beside in annotated(config)}
    notes |= dict.fromkeys(_ELASTIC_CIRCUMSTANCES, (ELASTIC,))
    then = {
        name: note.before for name in notes for note in notes[name] if isinstance(note, Since)
    } | flat(resumed.config)
    now = flat({**config.describe(), **circumstances})
    changed = [
        name
        for name, value in sorted(now.items())
        if value != then.get(name) and FREE not in notes.get(name, ())
    ]
    texts = [
        "other training images" if name == "data" else f"{name}: {then.get(name)} -> {now[name]}"
        for name in changed
    ]
    return texts, all(ELASTIC in notes.get(name, ()) for name in changed)


def _choose(folder: Path) -> Path | None:
    """The last undamaged checkpoint; damaged later ones are renamed to `*.damaged`."""
    damaged: list[Path] = []
    for path in reversed(files(folder)):
        why = damage_of(path)
        if why is None:
            for each in damaged:
                aside = each.rename(each.with_suffix(".damaged"))
                write_event(folder, step_of(path), "damaged checkpoint", file=aside.name)
                print(f"{each} is damaged; resuming from {path.name}", file=sys.stderr)
            return path
        damaged.append(path)
    if damaged:
        raise UserError(
            f"{damaged[0]} is damaged, and no earlier checkpoint is whole; remove it to start again"
        )
    return None


def _wait_to_see(file: Path, ranks: Ranks) -> None:
    """Wait until every rank sees a file as the main rank does.

    Raises:
        UserError: one does not, after two minutes.
    """

    def size() -> int | None:
        # Listing makes network file systems ask their server.
        listed = file.parent.is_dir() and file.name in os.listdir(file.parent)
        return file.stat().st_size if listed else None

    mains = ranks.from_main(size)
    until = time.monotonic() + SEEN_WITHIN
    while not (same := size() == mains) and time.monotonic() < until:
        time.sleep(0.1)
    blind = sorted({node for node, sees in ranks.gather((ranks.node, same)) if not sees})
    if blind:
        raise UserError(
            f"{file} did not appear on {', '.join(blind)} within {SEEN_WITHIN:.0f} s; --out must "
            "be on a file system that all machines of the run share"
        )
