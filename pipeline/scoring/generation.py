"""Generations: scores of all images of a data set by one encoder, in one file.

    <run>/refresh/generation-<step>.zip    a zipped zarr group; attributes: run, step, data, specs
        <kind>                             float16 [R, G, G], rows as in SampleTable

A file appears under its name whole, and never changes. The zip has a checksum of each member.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.storage import ZipStore

from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.scores import ModelScoreSpec

_NAME = re.compile(r"generation-(\d{8})\.zip")
_CHUNK = 8 << 20  # bytes


class GenerationError(UserError):
    """A generation is missing, damaged, or of other images; the message has the remedy."""


@dataclass(frozen=True)
class Generation:
    """The attributes of a generation's file.

    Attributes:
        run: id of the run that trained the encoder.
        step: optimiser steps that the encoder was trained for.
        data: `SampleTable.digest` of the images.
        specs: description of the score, by kind.
    """

    path: Path
    run: str
    step: int
    data: str
    specs: dict[str, dict[str, object]]

    def maps(self, samples: SampleTable, kinds: Collection[str], grid: int) -> dict[str, Tensor]:
        """Maps by kind, `[R, grid, grid]` float16, mean 1 an image, a row for each of `samples`.

        Raises:
            GenerationError: the file has other images, kinds or another grid, or is damaged.
        """
        why = ""
        if self.data != samples.digest:
            why = "scores other images than those of these shards"
        elif missing := sorted(set(kinds) - set(self.specs)):
            why = f"has no scores of kind {', '.join(missing)}"
        elif grids := {self.specs[kind]["grid"] for kind in kinds} - {grid}:
            why = f"has {grids.pop()} cells a side, and the crops have {grid} patches"
        if why:
            raise GenerationError(
                f"{self.path} {why}; make another one by `famt refresh --out <folder>`"
            )
        with _opened(self.path) as group:
            maps = {kind: np.asarray(group[kind][...]) for kind in kinds}  # type: ignore[index]
        shape = (len(samples), grid, grid)
        for kind, each in maps.items():
            if each.shape != shape or each.dtype != np.float16 or not np.isfinite(each).all():
                raise _damaged(self.path, f"{kind} has other values than were written")
        return {kind: torch.from_numpy(each) for kind, each in maps.items()}


def generation_path(folder: Path, step: int) -> Path:
    """The file of a generation in a folder."""
    return folder / f"generation-{step:08d}.zip"


def write_generation(
    path: Path, run: str, data: str, maps: Mapping[ModelScoreSpec, NDArray[np.float16]]
) -> None:
    """Write a generation at its `generation_path`: other processes see all of it or nothing.

    Args:
        run, data: as of `Generation`.
        maps: `[R, G, G]`, finite, by spec.
    """
    specs = {spec.kind: spec.describe() for spec in maps}
    attributes = {"run": run, "step": step_of(path), "data": data, "specs": specs}
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ZipStore(partial, mode="w", compression=zipfile.ZIP_STORED) as store:
            group = zarr.create_group(store, attributes=attributes)
            for spec, each in maps.items():
                rows = max(1, min(len(each), _CHUNK // (2 * spec.grid**2)))
                group.create_array(
                    spec.kind,
                    data=each,
                    chunks=(rows, spec.grid, spec.grid),
                    compressors=None,  # maps shrink by a seventh at best
                    fill_value=np.nan,  # what a missing chunk reads as
                )
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        for left in path.parent.glob("generation-*.part"):  # of killed writers too
            if step_of(left) <= step_of(path):
                left.unlink(missing_ok=True)


def open_generation(path: Path) -> Generation:
    """Read a generation's attributes; a GenerationError if there is none, or it is damaged."""
    if not _NAME.fullmatch(path.name):
        raise GenerationError(
            f"{path} is no generation: give the path of a generation-<step>.zip, in a run's folder "
            "`refresh` or where `famt refresh --out` put it"
        )
    with _opened(path) as group:
        found = Generation(path, **group.attrs.asdict())  # type: ignore[arg-type]
    if found.step != step_of(path):
        raise _damaged(path, f"it is of step {found.step}")
    return found


def generations(folder: Path) -> list[Path]:
    """Files of the generations in a folder, oldest first."""
    return sorted(path for path in folder.glob("generation-*.zip") if _NAME.fullmatch(path.name))


def newest_generation(path: Path) -> Generation:
    """The generation of a file, or the newest in a folder; errors as of `open_generation`."""
    found = generations(path)
    return open_generation(found[-1] if found else path)


def step_of(path: Path) -> int:
    """The step of a generation, from its file's name."""
    return int(path.name.removeprefix("generation-")[:8])


@contextmanager
def _opened(path: Path) -> Iterator[zarr.Group]:
    try:
        store = ZipStore(path, mode="r")
        group = zarr.open_group(store, mode="r")
        with store:
            yield group
    except FileNotFoundError:
        raise GenerationError(
            f"{path}: no such generation; put it back, or make one by `famt refresh --out <folder>`"
        ) from None
    except Exception as error:  # zipfile, zarr and codecs each raise their own
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk can't be read now
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> GenerationError:
    return GenerationError(
        f"{path} is damaged ({why}). Remove it: the job that follows its run makes it again while "
        "the encoder is there, and with --elastic the run goes on with the newest that is left"
    )
