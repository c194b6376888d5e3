"""A run's state on disk: how a checkpoint is written and read, and how a run goes on from it."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
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
from famt.pipeline.options import ELASTIC, FREE, annotated, flat
from famt.pipeline.storage import reason
from famt.train.config import TrainingOptions
from famt.train.distributed import Ranks
from famt.train.files import written_whole
from famt.train.log import write_event
from famt.train.signals.config import AttentionConfig, FrequencyConfig

FORMAT = 2
"""version of the files here; raise it where one of before can't be gone on from exactly"""

CLASSIFIER = "classifier"
"""method of fine-tuning runs: an encoder with a classifier, no pre-training model"""

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")
_SEEN_WITHIN = 120.0  # seconds; NFS clients may keep an old listing for one minute

# Circumstances that may differ from the beginning of an epoch, as options do that are `ELASTIC`.
_ELASTIC_CIRCUMSTANCES = ("data", "world_size")


class Component(Protocol):
    """A part of a run that owns its state, as modules and optimisers of torch do."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> object: ...


@runtime_checkable
class Elastic(Component, Protocol):
    """A component that goes on otherwise if options differ, from the beginning of an epoch."""

    def restart(self, state: dict[str, Any], epoch: int) -> None: ...


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
        epoch: whole epochs done.
        method: key of `famt.methods.METHODS`, or `CLASSIFIER`.
        sizes: fields of the `famt.models.ModelConfig` that the model is built from.
        components: states of the run's components by name: model, optimisation, and each signal by
            its slot.
        ranks: states of the components that each rank has for itself, by name.
        config: the run's options and circumstances, spelled out.
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
        """The averaged weights of its encoder, if the run keeps them."""
        return self.components["optimisation"]["ema"]

    @property
    def signals(self) -> dict[str, dict[str, Any]]:
        """The state of each signal, by its slot."""
        others = ("model", "optimisation")
        return {name: state for name, state in self.components.items() if name not in others}

    def restore(
        self, components: Mapping[str, Component], own: Mapping[str, Component], rank: int
    ) -> None:
        """Let a run go on with the very next batch.

        Args:
            components: of the run.
            own: of this rank.
        """
        for name, component in components.items():
            component.load_state_dict(self.components[name])
        for name, component in own.items():
            component.load_state_dict(self.ranks[rank][name])

    def restart(self, components: Mapping[str, Component]) -> None:
        """Let a run go on from the beginning of an epoch, with other options or data."""
        for name, component in components.items():
            if isinstance(component, Elastic):
                component.restart(self.components[name], self.epoch)
            else:
                component.load_state_dict(self.components[name])


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


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the latest one of a run's folder.

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
        return Checkpoint(**_read(path))
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


def is_finetuned(source: str | Path) -> bool:
    """Whether a source is the folder or a checkpoint of a fine-tuning run."""
    path = Path(source)
    of_run = bool(_NAME.fullmatch(path.name)) if path.is_file() else latest(path) is not None
    return of_run and load(path).method == CLASSIFIER


def load_classifier(path: Path, *, ema: bool = False) -> VisionTransformer:
    """Encoder and head of a fine-tuning run's checkpoint file or folder, in eval mode.

    Args:
        ema: with the averaged weights.
    """
    checkpoint = load(path)
    weights = checkpoint.ema if ema else checkpoint.model
    if weights is None:
        raise UserError(f"{path} keeps no averaged weights; train with --optimiser.ema-decay")
    mean = "fc_norm.weight" in weights
    model = ModelConfig(**checkpoint.sizes).build(
        num_classes=len(weights["head.bias"]),
        global_pool="avg" if mean else "token",
        fc_norm=mean,
    )
    model.load_state_dict(weights)
    return model.eval()


def _load_pretrained(path: Path) -> Checkpoint:
    checkpoint = load(path)
    if checkpoint.method not in METHODS:
        raise UserError(f"{path} is of fine-tuning; give the run that was pre-trained")
    return checkpoint


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if damage := damage_of(path):
        raise DamagedError(f"{path} is damaged: {damage}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, TypeError, EOFError, LookupError, UnpicklingError) as error:
        raise UserError(f"{path} is no whole file of this program: {reason(error)}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is no file of this program")
    written = content.pop("format")
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


def resume(
    config: TrainingOptions,
    circumstances: dict[str, object],
    ranks: Ranks,
    lost: Callable[[Checkpoint], list[str]] = lambda _: [],
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that a run goes on from, if there is one, and whether with the next batch.

    The main rank alone chooses it, the latest whose bytes are those that were written; the others
    wait until they see it. Every rank calls this.

    Args:
        config: of the run now.
        circumstances: what else must be as it was: device, world size, data.
        ranks: this rank among those of the run.
        lost: names what an exact continuation of a checkpoint needs and does not find any more; the
            main rank alone calls it.

    Returns:
        the checkpoint or None, and False if it must go back to the beginning of the epoch.

    Raises:
        ValueError: the folder's run is another one, or may not be gone on with; all of its
            checkpoints are damaged; or a machine does not see the folder.
    """
    chosen = ranks.from_main(lambda: _choose(config.out))
    found = chosen and config.out / chosen.name  # each machine looks in its own --out
    _wait_to_see(found or config.out / "lock", ranks)
    if found is None:
        return None, True
    if config.resume == "never":
        raise UserError(f"{found} is there; --resume never wants a folder without checkpoints")
    resumed = load(found)
    then, now = flat(resumed.config), flat({**config.describe(), **circumstances})
    notes = {name: beside for name, _, beside in annotated(config)}
    notes |= dict.fromkeys(_ELASTIC_CIRCUMSTANCES, (ELASTIC,))
    differing = sorted(name for name in now if then.get(name) != now[name])
    changed = [name for name in differing if FREE not in notes.get(name, ())]
    harmless = all(ELASTIC in notes.get(name, ()) for name in changed)
    if config.elastic and changed and harmless:
        return resumed, False
    if not changed:
        gone = ranks.from_main(lambda: lost(resumed))
        if gone and not config.elastic:
            raise UserError(
                f"{found} can't be gone on from exactly without {', '.join(gone)}; --elastic goes "
                "on from the beginning of the epoch with what is there"
            )
        return resumed, not gone
    differences = "; ".join(f"{each}: {then.get(each)} -> {now[each]}" for each in changed)
    remedy = "use the same, or another --out"
    if harmless:
        remedy += ", or --elastic to go on from the beginning of the epoch"
    raise UserError(f"{found} belongs to a run with other options ({differences}); {remedy}")


def _choose(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; those after it are set aside as `*.damaged`."""
    damaged: list[Path] = []
    for path in reversed(files(folder)):
        why = damage_of(path)
        if why is None:
            for each in damaged:
                aside = each.rename(each.with_suffix(".damaged"))
                told = {"file": aside.name, "going_on_from": path.name}
                write_event(folder, step_of(path), "damaged checkpoint", **told)
                print(f"{each} is damaged; going on from {path.name}", file=sys.stderr)
            return path
        damaged.append(path)
    if damaged:
        raise DamagedError(
            f"{damaged[0]} is damaged and no whole checkpoint is before it; remove it to begin anew"
        )
    return None


def _wait_to_see(file: Path, ranks: Ranks) -> None:
    """Wait until every rank sees a file as the main one does.

    Raises:
        ValueError: one does not, after two minutes.
    """

    def size() -> int | None:
        # A listing makes clients of network file systems ask their server.
        listed = file.parent.is_dir() and file.name in os.listdir(file.parent)
        return file.stat().st_size if listed else None

    mains = ranks.from_main(size)
    until = time.monotonic() + _SEEN_WITHIN
    while not (same := size() == mains) and time.monotonic() < until:
        time.sleep(0.1)
    blind = sorted({node for node, sees in ranks.gather((ranks.node, same)) if not sees})
    if blind:
        raise UserError(
            f"{file} was not seen on {', '.join(blind)} within {_SEEN_WITHIN:.0f} s; --out "
            "must be a folder on a file system that all machines of the run share"
        )
