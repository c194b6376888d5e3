"""Checkpoints of a run: written whole or not at all, the last few kept."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.models import ModelConfig
from pipeline.options import ELASTIC, FREE, annotated
from pipeline.storage import reason
from train.distributed import Ranks
from train.log import write_event

_SEEN_WITHIN = 120.0  # seconds; NFS clients may keep an old listing for one minute
_NAME = re.compile(r"checkpoint-(\d{8})\.pt")

# Circumstances that may differ from the beginning of an epoch, as options do that are `ELASTIC`.
_ELASTIC_CIRCUMSTANCES = ("data", "world_size")


CLASSIFIER = "classifier"
"""method of fine-tuning runs: an encoder with a classifier, no pre-training model"""


class BusyError(ValueError):
    """Another process trains in a run's folder; it may be about to end."""


class DamagedError(ValueError):
    """A file whose bytes are not those that were written."""


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


class Options(Protocol):
    """What `resume` asks of a run's options: a dataclass with notes beside them."""

    @property
    def out(self) -> Path: ...
    @property
    def resume(self) -> Literal["auto", "never"]: ...
    @property
    def elastic(self) -> bool: ...
    def describe(self) -> dict[str, Any]: ...


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `<folder>/checkpoint-<step>.pt` and remove all but the last `keep`.

    The file appears under its name only when it is complete and on disk.

    Raises:
        OSError: the disk is full, say; earlier checkpoints are untouched.
    """
    path = folder / f"checkpoint-{checkpoint.step:08d}.pt"
    _write(path, vars(checkpoint))
    for old in _all(folder)[:-keep]:
        old.unlink()
    return path


def save_encoder(path: Path, encoder: Encoder) -> None:
    """Write an encoder's weights for the refresh job.

    Raises:
        OSError: the disk is full, say.
    """
    path.parent.mkdir(exist_ok=True)
    _write(path, vars(encoder))


def load_encoder(path: Path) -> Encoder:
    """The encoder of a checkpoint, of a run's latest one, or of a file that `save_encoder` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is neither.
    """
    if path.is_dir() or _NAME.fullmatch(path.name):
        state = load(path)
        prefix = "encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in state.model.items()
            if name.startswith(prefix)
        }
        slots = (state.config["content"], state.config["attention"])
        kinds = [each["kind"] for each in slots if "refreshed" in each["source"]]
        return Encoder(state.run, state.step, state.sizes, weights, state.config, kinds)
    try:
        return Encoder(**_read(path))
    except TypeError:
        raise ValueError(
            f"{path} is neither a checkpoint nor an encoder left for refresh"
        ) from None


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other processes from training in it meanwhile.

    What a killed run left half written in it is removed.

    Raises:
        ValueError: another process trains in it (`BusyError`), or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"--out {folder} is a file; give a folder") from None
    with open(folder / "lock", "a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise BusyError(
                f"{folder} is in use by {held.read().strip() or 'another run'}; wait for it, or "
                "give another --out"
            ) from None
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        held.flush()
        for place in (folder, folder / "refresh"):
            for partial in place.glob("*.partial"):  # of a writer that was killed
                partial.unlink()
        yield


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Read a checkpoint file, or the latest one of a run's folder.

    Args:
        path: of the file or folder.
        verified: its checksums were compared just now.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged (`DamagedError`), or no checkpoint of this program.
    """
    if path.is_dir():
        found = latest(path)
        if found is None:
            raise FileNotFoundError(f"{path} holds no checkpoint-*.pt; train one first")
        path = found
    try:
        return Checkpoint(**_read(path, verified=verified))
    except (TypeError, ValueError) as error:
        earlier = [each for each in _all(path.parent) if each < path]
        remedy = f"; remove it to go on from {earlier[-1].name}" if earlier else ""
        kind = DamagedError if isinstance(error, DamagedError) else ValueError
        raise kind(f"{path} is no whole checkpoint of this program{remedy}") from error


def load_model(path: Path, *, ema: bool = False) -> MaskedModel:
    """The model of a checkpoint file or run folder, in eval mode.

    Args:
        ema: with the averaged weights of the encoder.
    """
    checkpoint = load(path)
    if checkpoint.method not in METHODS:
        raise ValueError(f"{path} is of fine-tuning; give the run that was pre-trained")
    model = METHODS[checkpoint.method](ModelConfig(**checkpoint.sizes))
    model.load_state_dict(checkpoint.model)
    if ema:
        if checkpoint.ema is None:
            raise ValueError(f"{path} keeps no averaged weights; train with --optimiser.ema-decay")
        model.encoder.load_state_dict(checkpoint.ema)
    return model.eval()


def resume(
    config: Options, circumstances: dict[str, object], here: Ranks
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that a run goes on from, if there is one, and whether with the next batch.

    The main rank alone chooses it, the latest whose bytes are those that were written; the others
    wait until they see it. Every rank calls this.

    Args:
        config: of the run now.
        circumstances: what else must be as it was: device, world size, data.
        here: this rank.

    Returns:
        the checkpoint or None, and False if it must go back to the beginning of the epoch.

    Raises:
        ValueError: the folder's run is another one, or may not be gone on with; all of its
            checkpoints are damaged; or a machine does not see the folder.
    """
    found = here.from_main(lambda: _choose(config.out))
    _wait_to_see(config.out, found, here)
    if found is None:
        return None, True
    if config.resume == "never":
        raise ValueError(f"{found} is there; --resume never wants a folder without checkpoints")
    resumed = load(found, verified=here.is_main)
    then, now = _flat(resumed.config), _flat({**config.describe(), **circumstances})
    notes = {name: beside for name, _, beside in annotated(config)}
    notes |= dict.fromkeys(_ELASTIC_CIRCUMSTANCES, (ELASTIC,))
    differing = sorted(name for name in now if then.get(name) != now[name])
    changed = [name for name in differing if FREE not in notes.get(name, ())]
    harmless = all(ELASTIC in notes.get(name, ()) for name in changed)
    if not changed or (config.elastic and harmless):
        return resumed, not changed
    differences = "; ".join(f"{each}: {then.get(each)} -> {now[each]}" for each in changed)
    remedy = "use the same, or another --out"
    if harmless:
        remedy += ", or --elastic to go on from the beginning of the epoch"
    raise ValueError(f"{found} belongs to a run with other options ({differences}); {remedy}")


def _choose(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; those after it are set aside as `*.damaged`."""
    damaged: list[Path] = []
    for path in reversed(_all(folder)):
        why = _damage(path)
        if why is None:
            for each in damaged:
                aside = each.rename(each.with_suffix(".damaged"))
                told = {"file": aside.name, "going_on_from": path.name}
                write_event(folder, _step(path), "damaged checkpoint", **told)
                print(f"{each} is damaged; going on from {path.name}", file=sys.stderr)
            return path
        damaged.append(path)
    if damaged:
        raise DamagedError(
            f"{damaged[0]} is damaged and no whole checkpoint is before it; remove it to begin anew"
        )
    return None


def _wait_to_see(folder: Path, checkpoint: Path | None, here: Ranks) -> None:
    """Wait until every rank sees what the main one sees in a run's folder.

    Raises:
        ValueError: one does not, after two minutes.
    """
    files = [folder / "lock", *([checkpoint] if checkpoint else [])]

    def look() -> list[tuple[Path, int]]:
        # A listing makes clients of network file systems ask their server.
        names = {each.name for each in os.scandir(folder)} if folder.is_dir() else set()
        return [(each, each.stat().st_size) for each in files if each.name in names]

    mains = here.from_main(look)
    until = time.monotonic() + _SEEN_WITHIN
    while not (same := look() == mains) and time.monotonic() < until:
        time.sleep(0.1)
    blind = sorted({node for node, sees in here.gather((here.node, same)) if not sees})
    if blind:
        raise ValueError(
            f"{files[-1]} was not seen on {', '.join(blind)} within {_SEEN_WITHIN:.0f} s; --out "
            "must be a folder on a file system that all machines of the run share"
        )


def _flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that appears under its name only when it is complete and on disk."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        room = shutil.disk_usage(path.parent).free
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path}: could not be written, earlier checkpoints stand; {room / 1e6:.0f} MB were "
            f"free ({reason(error)})"
        ) from error


def _read(path: Path, *, verified: bool = False) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not verified and (damage := _damage(path)):
        raise DamagedError(f"{path} is damaged: {damage}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, TypeError, EOFError, LookupError, UnpicklingError) as error:
        raise ValueError(f"{path} is no whole file of this program: {reason(error)}") from error


def _damage(path: Path) -> str | None:
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
    return [_step(path) for path in _all(folder)]


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))
