"""Values whose tensors the processes of one machine share."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import shutil
import tempfile
import uuid
from dataclasses import dataclass

import torch
from torch import Tensor

_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Packed:
    """A value as one process hands it to the others of its machine.

    Attributes:
        path: file in /dev/shm that holds the tensors.
        size: of the file, bytes.
        rest: the pickled value, with places in the file for its tensors.
    """

    path: str
    size: int
    rest: bytes


def pack(value: object) -> Packed:
    """Copy a picklable value's CPU tensors to a new file in /dev/shm.

    Raises:
        OSError: it has not enough room. A process that wrote there anyway would be killed.
    """
    rest = io.BytesIO()
    packer = _Packer(rest)
    packer.dump(value)
    size = max(packer.size, 1)
    path = f"{_FOLDER}/famt-{uuid.uuid4().hex}"
    with open(path, "x+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            os.unlink(path)
            free = shutil.disk_usage(_FOLDER).free
            raise OSError(
                f"{_FOLDER} has {free / 1e6:.0f} MB free, and the ranks of this machine share "
                f"{size / 1e6:.0f} MB there; enlarge it (docker run --shm-size, or mount -o "
                f"remount,size=... {_FOLDER})"
            ) from error
        memory = mmap.mmap(file.fileno(), size)
    for place, tensor in packer.tensors:
        _at(memory, place).copy_(tensor)
    return Packed(path, size, rest.getvalue())


def unpack(packed: Packed) -> object:
    """The value; its tensors are the memory that all who unpack it read and write."""
    with open(packed.path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), packed.size)
    return _Unpacker(io.BytesIO(packed.rest), memory).load()


def drop_name(packed: Packed) -> None:
    """Nobody can unpack it any more; its memory goes with the last process that did."""
    os.unlink(packed.path)


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[tuple[_Place, Tensor]] = []
        self.size = 0

    def persistent_id(self, value: object) -> _Place | None:
        if not isinstance(value, Tensor):
            return None
        place = _Place(self.size, value.dtype, tuple(value.shape))
        self.tensors.append((place, value))
        self.size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        return place


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(file)
        self._memory = memory

    def persistent_load(self, place: _Place) -> Tensor:
        return _at(self._memory, place)


def _at(memory: mmap.mmap, place: _Place) -> Tensor:
    count = torch.Size(place.shape).numel()
    if count == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset)
    return flat.view(place.shape)
