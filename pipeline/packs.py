"""Copies of many shards' rows and maps in few large objects: what the start of a run reads.

    <cache>/packs/<pack id>/zarr.json   a zarr group; attributes: format, spec, grid, the shards'
                                        ids and how many rows each has
    <cache>/packs/<pack id>/samples     int64 [R, 3], as the shards' own, one after another
    <cache>/packs/<pack id>/maps        float16 [R, G, G], of that spec

A shard's own entry takes milliseconds to open, nearly all of it zarr's work, and from an object
store a round trip for each object. So the job that scores shards packs them when it is done.

A pack is named by the hash of its spec and of its shards, which are named by their content: it is
never out of date, it only may lack shards. Those are read from their entries, and so is all that a
damaged pack held; what a run gets is the same with packs and without. A pack never changes, and is
whole when its own zarr.json is there, which is put last.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from tqdm import tqdm

from famt.pipeline.arrays import MAPS, SAMPLES, Run, pack_objects, read_rows, remedy
from famt.pipeline.cache import ScoreCache
from famt.pipeline.scores import Spec
from famt.pipeline.sealed import CacheError, damaged, unseal_zarr

_FEW = 64  # shards whose entries, read side by side, take no longer than looking into packs
_LOOSE = 16  # a new pack is made when more than one shard in so many is in none
_BLOCK = 64  # entries that are in memory at a time while they are copied
_CHECKED = 1 << 16  # rows that are in memory at a time while a pack is checked


@dataclass(frozen=True)
class Pack:
    """What a pack holds.

    Attributes:
        folder: where in the cache it lies.
        spec_id: of the score that its maps are of.
        grid: cells a side of the maps.
        shards: their ids, in the order of its rows.
        rows: how many each shard has.
    """

    folder: str
    spec_id: str
    grid: int
    shards: list[str]
    rows: list[int]


@dataclass(frozen=True)
class _Place:
    """The rows of a shard in a pack."""

    pack: Pack
    first: int
    rows: int


class Packed:
    """Rows and maps of shards, from packs as far as they are there, else from entries.

    Args:
        cache: it holds both.
        spec: the score whose maps are wanted; None if rows alone are.
        wanted: how many shards are; packs are not looked into for a few.
    """

    def __init__(self, cache: ScoreCache, spec: Spec | None, wanted: int) -> None:
        self._cache, self._spec = cache, spec
        self._places: dict[str, _Place] = {}
        for pack in sound_packs(cache) if wanted >= _FEW else ():
            if spec is None or pack.spec_id == spec.id:
                for shard_id, rows in zip(pack.shards, _slices(pack.rows), strict=True):
                    place = _Place(pack, rows.start, rows.stop - rows.start)
                    self._places.setdefault(shard_id, place)

    def __contains__(self, shard_id: object) -> bool:
        return shard_id in self._places

    def samples(self, shard_ids: list[str]) -> tuple[NDArray[np.int64], list[int]]:
        """Offset, size and label `[R, 3]` of all rows of shards, and how many rows each has.

        Raises:
            CacheError: see `ScoreCache.read_samples`.
        """
        loose = [each for each in shard_ids if each not in self._places]
        read = dict(zip(loose, self._cache.read_samples(loose), strict=True))
        counts = [len(read[x]) if x in read else self._places[x].rows for x in shard_ids]
        samples = np.empty((sum(counts), 3), np.int64)
        wanted = list(zip(shard_ids, _slices(counts), strict=True))
        for shard_id, rows in wanted:
            if shard_id in read:
                samples[rows] = read[shard_id]
        packed = [each for each in wanted if each[0] not in read]
        self._fill(samples, SAMPLES, packed, self._cache.read_samples)
        return samples, counts

    def maps(self, shard_ids: list[str], counts: Sequence[int]) -> NDArray[np.float16]:
        """The maps `[R, G, G]` of all rows of shards that have so many rows.

        Raises:
            CacheError: see `ScoreCache.read_maps`; or a shard has another number of maps.
        """
        spec = self._spec
        assert spec is not None
        maps = np.empty((sum(counts), spec.grid, spec.grid), np.float16)
        wanted = list(zip(shard_ids, _slices(counts), strict=True))
        self._fill(maps, MAPS, wanted, lambda ids: self._cache.read_maps(ids, spec))
        return maps

    def _fill(
        self,
        out: NDArray,
        array: str,
        wanted: list[tuple[str, slice]],
        read_entries: Callable[[list[str]], list[NDArray]],
    ) -> None:
        """Copy shards' rows to their places in `out`."""
        loose: list[tuple[str, slice]] = []
        packed: defaultdict[str, list[tuple[str, slice]]] = defaultdict(list)
        for shard_id, rows in wanted:
            place = self._places.get(shard_id)
            (packed[place.pack.folder] if place else loose).append((shard_id, rows))
        for folder, held in packed.items():
            runs = [Run(self._places[x].first, rows.start, _length(rows)) for x, rows in held]
            try:
                read = read_rows(self._cache.arrays, f"{folder}/{array}", runs, out)
                self._cache.run(read)
            except (CacheError, FileNotFoundError) as error:  # damaged, or collected just now
                _tell(error)
                loose += held
        for start in range(0, len(loose), _BLOCK):
            block = loose[start : start + _BLOCK]
            found = read_entries([shard_id for shard_id, _ in block])
            for (shard_id, rows), part in zip(block, found, strict=True):
                if len(part) != _length(rows):
                    raise CacheError(
                        f"shard {shard_id} in {self._cache.url}: {len(part)} {array} of "
                        f"{_length(rows)} samples. Remove {self._cache.url}/shards/{shard_id} and "
                        "run jobs/precompute_freq.py again"
                    )
                out[rows] = part


def sound_packs(cache: ScoreCache) -> list[Pack]:
    """The packs of a cache; those that are damaged are told of and left out."""

    def read(name: str) -> Pack | None:
        try:
            return read_pack(cache, name)
        except CacheError as error:
            _tell(error)
            return None

    with ThreadPoolExecutor(16) as pool:
        return [each for each in pool.map(read, cache.objects.children("packs")) if each]


def useful_packs(cache: ScoreCache, named: Set[str]) -> list[Pack]:
    """Packs of which most is named, as a set of shard ids, and lies in no other one of these."""
    useful: list[Pack] = []
    covered: set[tuple[str, str]] = set()
    for pack in sorted(sound_packs(cache), key=lambda pack: len(pack.shards), reverse=True):
        gained = {(pack.spec_id, each) for each in pack.shards if each in named} - covered
        if 2 * len(gained) > len(pack.shards):
            useful.append(pack)
            covered |= gained
    return useful


def read_pack(cache: ScoreCache, name: str) -> Pack | None:
    """What the pack of that name holds; None if it is not whole.

    Raises:
        CacheError: it is damaged.
    """
    path = f"packs/{name}/zarr.json"
    try:
        data = cache.objects.get(path)
    except FileNotFoundError:
        return None
    attributes = unseal_zarr(data, cache.url, path, remedy(cache.url, path))
    return Pack(
        folder=f"packs/{name}",
        spec_id=attributes["spec"],
        grid=attributes["grid"],
        shards=attributes["shards"],
        rows=attributes["rows"],
    )


def pack_loose(cache: ScoreCache, shard_ids: list[str], spec: Spec) -> Pack | None:
    """Pack those of the shards that no pack of that score holds; None if they are too few.

    Args:
        cache: it has rows and maps of all of them.
        shard_ids: what runs are going to read together, in their order.
        spec: the score whose maps are packed too.

    Raises:
        CacheError: an entry is not there or damaged.
        OSError: the store refused.
    """
    shard_ids = list(dict.fromkeys(shard_ids))
    packed = Packed(cache, spec, len(shard_ids))
    loose = [each for each in shard_ids if each not in packed]
    if len(loose) < _FEW or len(loose) * _LOOSE <= len(shard_ids):
        return None
    return write_pack(cache, loose, spec)


def write_pack(cache: ScoreCache, shard_ids: list[str], spec: Spec) -> Pack:
    """Pack shards, whatever others hold; see `pack_loose`."""
    samples, counts = Packed(cache, None, 0).samples(shard_ids)
    pack = Pack(f"packs/{_name(spec.id, shard_ids)}", spec.id, spec.grid, shard_ids, counts)

    def maps() -> Iterator[NDArray[np.float16]]:
        entries = Packed(cache, spec, 0)
        with tqdm(total=len(shard_ids), desc="packing", unit="shard", mininterval=1) as bar:
            for start in range(0, len(shard_ids), _BLOCK):
                block = slice(start, start + _BLOCK)
                yield entries.maps(shard_ids[block], counts[block])
                bar.update(len(shard_ids[block]))

    attributes = {"spec": spec.id, "grid": spec.grid, "shards": shard_ids, "rows": counts}
    shape = (len(samples), spec.grid, spec.grid)
    for path, data in pack_objects(pack.folder, attributes, samples, maps(), shape):
        cache.objects.put(path, data)
    return pack


def check_pack(cache: ScoreCache, pack: Pack, shard_ids: Collection[str]) -> None:
    """Read a pack whole, and compare those of the shards that it holds with their entries.

    Raises:
        CacheError: it is damaged, an entry is, or they differ.
    """
    held = [
        (shard_id, rows)
        for shard_id, rows in zip(pack.shards, _slices(pack.rows), strict=True)
        if shard_id in shard_ids
    ]
    total, shape = sum(pack.rows), (pack.grid, pack.grid)
    for array, row, dtype in ((SAMPLES, (3,), np.int64), (MAPS, shape, np.float16)):
        path = f"{pack.folder}/{array}"
        for first in range(0, total, _CHECKED):
            rows = np.empty((min(_CHECKED, total - first), *row), dtype)
            try:
                cache.run(read_rows(cache.arrays, path, [Run(first, 0, len(rows))], rows))
            except FileNotFoundError as error:
                raise _damaged(cache, path, "it is gone") from error
            for shard_id, own in held:
                begin, end = max(own.start, first), min(own.stop, first + len(rows))
                if begin < end:
                    entry = (
                        cache.read_samples([shard_id])[0]
                        if array == SAMPLES
                        else cache.any_maps(shard_id, pack.spec_id)
                    )[begin - own.start : end - own.start]
                    if not np.array_equal(rows[begin - first : end - first], entry):
                        raise _damaged(cache, path, f"shard {shard_id} has others")


def _name(spec_id: str, shard_ids: list[str]) -> str:
    return blake3("\n".join([spec_id, *shard_ids]).encode()).hexdigest(length=16)


def _slices(counts: Sequence[int]) -> list[slice]:
    """The rows of each of several parts that follow one another."""
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _length(rows: slice) -> int:
    return rows.stop - rows.start


def _damaged(cache: ScoreCache, path: str, why: str) -> CacheError:
    return damaged(f"{cache.url}/{path}", why, remedy(cache.url, path))


def _tell(error: Exception) -> None:
    print(f"{error}; its shards are read one by one", file=sys.stderr)
