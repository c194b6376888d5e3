"""Entries and packs as zarr objects: how they are made, and how they are read back and checked.

An array's zarr.json has the checksums of its chunks, and one of itself and its place. So an object
that was cut short, in which a bit flipped, or that is another's is found when it is read. An array
of an entry is one chunk, compressed; one of a pack is chunks of 8 MB, which are not: maps shrink by
a seventh at best, and are read at half the speed.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import zarr
import zarr.api.asynchronous
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, WrapperStore
from zarr.storage import ObjectStore as ZarrStore

from famt.pipeline import storage
from famt.pipeline.scores import Spec
from famt.pipeline.sealed import (
    FORMAT,
    CacheError,
    checksum,
    chunks_of,
    damaged,
    seal_zarr,
    unseal_zarr,
)

SAMPLES, KEY, MAPS = "samples", "key", "maps"
_CHUNK = 8 << 20  # bytes of a pack's
_CHUNKS_AT_ONCE = 16


class Run(NamedTuple):
    """Rows of an array on their way: the first, the place of the first, and how many."""

    first: int
    to: int
    rows: int


def table_objects(
    folder: str, attributes: dict[str, Any], samples: NDArray[np.int64], keys: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Paths and bytes of a table's objects, in the order to put them: the last completes it.

    Args:
        folder: of the entry in the cache, as below.
        attributes: of the group.
        samples: `[n, 3]`: offset, size, label.
        keys: of the samples.
    """
    group, objects = _group({"format": FORMAT, **attributes})
    _add(group, SAMPLES, samples, {})
    _add(group, KEY, np.array(keys, dtype=np.dtypes.StringDType()), {})
    return _sealed(folder, objects, {})


def maps_objects(folder: str, spec: Spec, maps: NDArray[np.float16]) -> Iterator[tuple[str, bytes]]:
    """Paths and bytes of the objects of maps, in the order to put them: the last completes them."""
    group, objects = _group({})
    _add(group, spec.id, maps, {"spec": spec.describe()})
    del objects["zarr.json"]
    return _sealed(folder, objects, {})


def pack_objects(
    folder: str,
    attributes: dict[str, Any],
    samples: NDArray[np.int64],
    maps: Iterable[NDArray[np.float16]],
    shape: tuple[int, ...],
) -> Iterator[tuple[str, bytes]]:
    """Paths and bytes of a pack's objects, in the order to put them: the last completes it.

    Args:
        folder: of the pack in the cache.
        attributes: of the group.
        samples: `[R, 3]`: offset, size, label.
        maps: all maps, block after block.
        shape: of the maps together, `(R, G, G)`.
    """
    group, objects = _group({"format": FORMAT, **attributes})
    sums: dict[str, str] = {}
    for written, data in itertools.chain(
        _chunks(group, objects, SAMPLES, [samples], samples.shape, samples.dtype),
        _chunks(group, objects, MAPS, maps, shape, np.dtype(np.float16)),
    ):
        sums[written] = checksum(data)
        yield f"{folder}/{written}", data
    yield from _sealed(folder, objects, sums)


class CheckedStore(WrapperStore[ZarrStore]):
    """A store whose objects are all there and whole, or an error: zarr reads a chunk that is gone
    as zeros.

    Args:
        store: of the cache.
        url: of the cache, for errors.
    """

    def __init__(self, store: ZarrStore, url: str) -> None:
        super().__init__(store)
        self.url = url
        self._sums: dict[str, str] = {}  # of the chunks of arrays that were opened, by their keys

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """See zarr; raises CacheError."""
        data = await super().get(key, prototype, byte_range)
        if key.endswith("/zarr.json"):
            if data is not None:
                helps = remedy(self.url, key)
                attributes = unseal_zarr(data.to_bytes(), self.url, key, helps)
                array = key.removesuffix("zarr.json")
                self._sums |= {array + name: each for name, each in chunks_of(attributes).items()}
            return data
        if data is None or checksum(data.as_numpy_array().data) != self._sums.get(key):
            why = "it is gone" if data is None else "it was changed, or is another object"
            raise damaged(f"{self.url}/{key}", why, remedy(self.url, key))
        return data


async def read_array(store: CheckedStore, path: str) -> NDArray:
    """An array of an entry, whole and as it was put.

    Raises:
        FileNotFoundError: there is none.
        CacheError: it is damaged.
    """
    with _codecs_errors(store, path):
        return np.asarray(await (await _open(store, path)).getitem(...))


async def read_rows(store: CheckedStore, path: str, runs: Sequence[Run], out: NDArray) -> None:
    """Copy runs of rows of a pack's array to their places in `out`, reading each chunk once.

    Raises:
        FileNotFoundError: there is no such array.
        CacheError: it is damaged, or of another shape or dtype than `out`.
    """
    with _codecs_errors(store, path):
        array = await _open(store, path)
        if array.shape[1:] != out.shape[1:] or array.dtype != out.dtype:
            raise ValueError(f"{array.dtype} {list(array.shape)}")
        pieces = _by_chunk(runs, array.chunks[0])
        turn = asyncio.Semaphore(_CHUNKS_AT_ONCE)

        async def copy(chunk: int) -> None:
            async with turn:
                first = chunk * array.chunks[0]
                rows = np.asarray(await array.getitem(slice(first, first + array.chunks[0])))
                for piece in pieces[chunk]:
                    begin = piece.first - first
                    out[piece.to : piece.to + piece.rows] = rows[begin : begin + piece.rows]

        await asyncio.gather(*map(copy, pieces))


def _by_chunk(runs: Sequence[Run], chunk: int) -> dict[int, list[Run]]:
    """Parts of runs by the number of the chunk that they lie in; runs that follow on are joined."""
    pieces: defaultdict[int, list[Run]] = defaultdict(list)
    for first, to, rows in runs:
        while rows:
            number = first // chunk
            count = min(rows, (number + 1) * chunk - first)
            last = pieces[number][-1] if pieces[number] else Run(-1, -1, 0)
            if (last.first + last.rows, last.to + last.rows) == (first, to):
                pieces[number][-1] = last._replace(rows=last.rows + count)
            else:
                pieces[number].append(Run(first, to, count))
            first, to, rows = first + count, to + count, rows - count
    return pieces


async def _open(store: CheckedStore, path: str) -> zarr.AsyncArray:
    return await zarr.api.asynchronous.open_array(store=store, path=path, mode="r", zarr_format=3)


@contextmanager
def _codecs_errors(store: CheckedStore, path: str) -> Iterator[None]:
    """Codecs raise anything on what is no code of theirs: tell it as damage."""
    try:
        yield
    except (CacheError, *storage.UNREACHABLE):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise damaged(f"{store.url}/{path}", reason, remedy(store.url, path)) from error


def remedy(url: str, path: str) -> str:
    """What helps against damage in an object: to remove what it is part of."""
    parts = path.split("/")
    if parts[0] == "packs":
        return f"Remove {url}/{'/'.join(parts[:2])}; it is a copy, which the next score job makes"
    if len(parts) > 3 and parts[2] not in (SAMPLES, KEY):
        return (
            f"Remove {url}/{'/'.join(parts[:3])} and make these maps again: "
            "jobs/precompute_freq.py for scores of pixels, jobs/refresh_scores.py for a model's"
        )
    return f"Remove {url}/{'/'.join(parts[:2])} and run jobs/precompute_freq.py again"


def _group(attributes: dict[str, Any]) -> tuple[zarr.Group, dict[str, Buffer]]:
    objects: dict[str, Buffer] = {}
    return zarr.create_group(MemoryStore(store_dict=objects), attributes=attributes), objects


def _add(group: zarr.Group, name: str, data: NDArray, attributes: dict[str, Any]) -> None:
    """One array in one chunk, compressed."""
    rows, codecs = len(data), [ZstdCodec()]
    array = _create(group, name, data.shape, data.dtype, rows, codecs=codecs, attributes=attributes)
    array[...] = data


def _chunks(
    group: zarr.Group,
    objects: dict[str, Buffer],
    name: str,
    blocks: Iterable[NDArray],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Iterator[tuple[str, bytes]]:
    """One array in equal chunks of some MB; yields them one by one."""
    size = dtype.itemsize * math.prod(shape)
    rows = -(-shape[0] // max(1, -(-size // _CHUNK)))
    array = _create(group, name, shape, dtype, rows)
    done = 0
    for part in _regrouped(blocks, array.chunks[0]):
        array[done : done + len(part)] = part
        done += len(part)
        for written in [each for each in objects if each.startswith(f"{name}/c/")]:
            yield written, objects.pop(written).to_bytes()
    if done != shape[0]:
        raise ValueError(f"{done} rows of {name} in place of {shape[0]}")


def _regrouped(blocks: Iterable[NDArray], rows: int) -> Iterator[NDArray]:
    """The rows of blocks, so many at a time; fewer at last."""
    waiting: list[NDArray] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= rows:
            joined = np.concatenate(waiting)
            whole = len(joined) // rows * rows
            yield from np.split(joined[:whole], range(rows, whole, rows))
            waiting = [joined[whole:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    rows: int,
    *,
    codecs: Sequence[ZstdCodec] = (),
    attributes: dict[str, Any] | None = None,
) -> zarr.Array:
    """An array of so many rows a chunk; zarr refuses chunks without extent: they get a length."""
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=tuple(max(1, extent) for extent in (rows, *shape[1:])),
        compressors=codecs,
        attributes=attributes,
        config={"write_empty_chunks": True},  # a chunk that is not there is damage
    )


def _sealed(
    folder: str, objects: dict[str, Buffer], sums: dict[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Data first, then each array's metadata, then the group's.

    Args:
        sums: checksums of chunks that were put already, by their names.
    """
    for name in sorted(objects, key=lambda name: (name.endswith("zarr.json"), -name.count("/"))):
        data, (array, metadata, _) = objects[name].to_bytes(), name.rpartition("zarr.json")
        if metadata:
            own = {x.removeprefix(array): y for x, y in sums.items() if x.startswith(array)}
            data = seal_zarr(data, f"{folder}/{name}", own if array else None)
        else:
            sums[name] = checksum(data)
        yield f"{folder}/{name}", data
