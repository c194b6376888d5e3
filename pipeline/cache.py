"""The score cache: content-addressed zarr entries that all experiments share.

    <cache>/shards/<shard id>/zarr.json       a zarr group; attributes: format, columns, bytes,
                                              damage, kept, quarantined (key and reason of each),
                                              passed_over (ending -> number of other files)
    <cache>/shards/<shard id>/samples         int64 [n, 3]: offset, size, label, in tar order
    <cache>/shards/<shard id>/key             string [n]
    <cache>/shards/<shard id>/<spec id>       float16 [n, G, G]; attributes: the spec, spelled out
    <cache>/datasets/<folder>/<version>.json  for a folder of shards: name -> size, stamp, shard id
    <cache>/packs/<pack id>/                  copies of many entries together: famt.pipeline.packs

A shard id is the hash of the tar's bytes and a spec id that of the score's definition, so an entry
never changes and whoever writes it writes the same bytes. (Machines that round otherwise write
others. If two of them put the same maps in the same milliseconds, chunk and checksum may be of
different writers: that is found as damage, never believed.) An object is put whole, data before
metadata: an array or group whose `zarr.json` exists is complete. Nothing here deletes;
`famt.pipeline.collector` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from famt.pipeline.arrays import CheckedStore, maps_objects, read_array, remedy, table_objects
from famt.pipeline.errors import UserError
from famt.pipeline.generations import Generations
from famt.pipeline.manifest import Manifests
from famt.pipeline.notices import Claims, Notices
from famt.pipeline.objects import Objects, Stored, is_spec_id
from famt.pipeline.scores import ScoreSpec, Spec
from famt.pipeline.sealed import CacheError, damaged, unseal_zarr
from famt.pipeline.shards import Rejected

_CONCURRENT_READS = 64
_T = TypeVar("_T")


@dataclass(frozen=True)
class ShardTable:
    """What a shard holds: one entry a sample kept, in tar order, and what was left out.

    Attributes:
        key: sample names.
        offset, size: int64 `[n]`, where the image's bytes lie in the tar.
        label: int64 `[n]`, -1 where the sample has none.
        rejected: what was quarantined, with reasons.
        bytes: size of the tar.
        damage: what is wrong with the tar itself, or None.
        passed_over: how many files have which ending that are no part of any image.
    """

    key: list[str]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    rejected: list[Rejected]
    bytes: int
    damage: str | None
    passed_over: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardSummary:
    """A shard's table in numbers.

    Attributes:
        kept: samples that enter training.
        rejected: those that do not, with reasons; with `kept`, all that were seen.
        bytes: size of the tar.
        damage: what is wrong with the tar itself, or None.
        passed_over: how many files have which ending that are no part of any image.
    """

    kept: int
    rejected: list[Rejected]
    bytes: int
    damage: str | None
    passed_over: dict[str, int]


@dataclass(frozen=True)
class StoredMaps:
    """Maps of one spec; attributes as in `Entry`."""

    spec_id: str
    whole: bool
    bytes: int
    modified: datetime


@dataclass(frozen=True)
class Entry:
    """What is stored for one shard.

    Attributes:
        whole: False for what a killed writer left.
        maps: in the order of their spec ids.
        bytes, objects: what it takes in the store.
        modified: when its newest object was put.
    """

    shard_id: str
    whole: bool
    maps: list[StoredMaps]
    bytes: int
    objects: int
    modified: datetime

    @property
    def specs(self) -> list[str]:
        """Ids of the maps that are there, whole."""
        return [maps.spec_id for maps in self.maps if maps.whole]


class ScoreCache:
    """A score cache at a local path or an object-store URL.

    Args:
        url: its root folder.
        create: open it to be written, and make a local root that is not there.

    Attributes:
        objects: all that it holds.
        arrays: the same as zarr reads them, checked.
        manifests: which shard of which folder has which entry.
        generations: which maps belong to which moment of which training run.
        notices, claims: what a collection is about to delete, and writers are at work on.

    Raises:
        ValueError: an empty URL.
        FileNotFoundError: a local root that is not there, without `create`.
        OSError: a root that can't be made.
        CacheError: with `create`, a root whose folders hold what is no part of a cache.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        if not url:
            raise UserError("the score cache has no name; give a folder or URL as --cache")
        try:
            self.objects = Objects(url, create=create)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{url}: no score cache there; is it spelled right? One is made with `python "
                f"jobs/precompute_freq.py --shards ... --cache {url}`"
            ) from None
        self.url = self.objects.url
        self.manifests = Manifests(self.objects)
        self.generations = Generations(self.objects)
        self.arrays = CheckedStore(self.objects.zarr(), self.url)
        self.notices, self.claims = Notices(self.objects), Claims(self.objects)
        if create:
            self.objects.refuse_foreign()

    # Pickled to Ray workers: a store holds connections, its URL says all.
    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]

    def has_entry(self, shard_id: str, spec: Spec | None) -> bool:
        """Whether the shard's table is there, whole, and its maps of `spec` if one is given."""
        entry = f"shards/{shard_id}"
        return self.objects.exists(f"{entry}/zarr.json") and (
            spec is None or self.objects.exists(f"{entry}/{spec.id}/zarr.json")
        )

    def lacking(self, shard_ids: Sequence[str], specs: Sequence[Spec]) -> list[str]:
        """Those of the shards that have no table, or no maps of one of the specs."""

        def whole(shard_id: str) -> bool:
            return all(self.has_entry(shard_id, spec) for spec in specs)

        with ThreadPoolExecutor(32) as pool:
            found = pool.map(whole, shard_ids)
            return [each for each, there in zip(shard_ids, found, strict=True) if not there]

    def write(
        self, shard_id: str, table: ShardTable, spec: Spec, maps: NDArray[np.float16]
    ) -> None:
        """Put a shard's table, and maps of it; see `write_table` and `write_maps`."""
        self._check_new_maps(shard_id, spec, maps, len(table.label))
        self.write_table(shard_id, table)
        self.write_maps(shard_id, spec, maps)

    def write_table(self, shard_id: str, table: ShardTable) -> None:
        """Put what a shard holds, unless it is there.

        Raises:
            ValueError: another table is there, which maps go by.
            CacheError: the stored table is damaged.
            OSError: the store refused, a full disk say; nothing half-written is readable.
        """
        if self.has_entry(shard_id, None):
            if self.read_table(shard_id).key != table.key:
                raise UserError(
                    f"shard {shard_id}: these are other samples than {self.url} keeps of it"
                )
            return
        attributes = {
            "columns": ["offset", "size", "label"],
            "bytes": table.bytes,
            "kept": len(table.label),
            "damage": table.damage,
            "quarantined": [asdict(bad) for bad in table.rejected],
            "passed_over": table.passed_over,
        }
        samples = np.stack([table.offset, table.size, table.label], axis=1)
        for path, data in table_objects(f"shards/{shard_id}", attributes, samples, table.key):
            self.objects.put(path, data)

    def write_maps(self, shard_id: str, spec: Spec, maps: NDArray[np.float16]) -> None:
        """Put maps `[n, G, G]`, in the order of the shard's table, which is there.

        Raises:
            ValueError: maps that do not fit the table and spec, or are not finite.
            CacheError: no whole entry, or a damaged one.
            OSError: as `write_table`.
        """
        self._check_new_maps(shard_id, spec, maps, self.summary(shard_id).kept)
        for path, data in maps_objects(f"shards/{shard_id}", spec, maps):
            self.objects.put(path, data)

    def _check_new_maps(
        self, shard_id: str, spec: Spec, maps: NDArray[np.float16], kept: int
    ) -> None:
        shape = (kept, spec.grid, spec.grid)
        if maps.shape != shape or maps.dtype != np.float16 or not np.isfinite(maps).all():
            raise ValueError(
                f"shard {shard_id}: maps of {spec.id} must be finite float16 {list(shape)}, "
                f"got {maps.dtype} {list(maps.shape)}"
            )
        if not is_spec_id(spec.id):
            raise UserError(
                f"a score can't be named {spec.kind!r}: use letters, digits, _, . and - alone"
            )

    def read_table(self, shard_id: str) -> ShardTable:
        """The table of a shard.

        Raises:
            CacheError: no whole entry, a damaged one, or one of another format.
        """
        summary = self.summary(shard_id)
        samples, key = self.run(self._arrays(shard_id, ["samples", "key"]))
        self._check_samples(shard_id, samples, summary.kept)
        if key.shape != (summary.kept,):
            raise self._damaged(shard_id, "key", f"{list(key.shape)} for {summary.kept} samples")
        offset, size, label = samples.T
        return ShardTable(
            key=[str(each) for each in key],
            offset=offset,
            size=size,
            label=label,
            rejected=summary.rejected,
            bytes=summary.bytes,
            damage=summary.damage,
            passed_over=summary.passed_over,
        )

    def summary(self, shard_id: str) -> ShardSummary:
        """What a shard's entry says of itself, from its metadata alone.

        Raises:
            CacheError: no whole entry, a damaged one, or one of another format.
        """
        try:
            data = self.objects.get(f"shards/{shard_id}/zarr.json")
        except FileNotFoundError:
            raise self._no_entry(shard_id) from None
        attributes = self._attributes(shard_id, data)
        return ShardSummary(
            kept=attributes["kept"],
            rejected=[Rejected(**bad) for bad in attributes["quarantined"]],
            bytes=attributes["bytes"],
            damage=attributes["damage"],
            passed_over=attributes["passed_over"],
        )

    def read_samples(self, shard_ids: list[str]) -> list[NDArray[np.int64]]:
        """Offset, size and label `[n, 3]` of the samples that shards keep, read side by side.

        Raises:
            CacheError: no whole entry, a damaged one, or one of another format.
        """

        async def read(shard_id: str) -> NDArray:
            try:
                data = await self.objects.get_async(f"shards/{shard_id}/zarr.json")
            except FileNotFoundError:
                raise self._no_entry(shard_id) from None
            kept = self._attributes(shard_id, data)["kept"]
            (samples,) = await self._arrays(shard_id, ["samples"])
            self._check_samples(shard_id, samples, kept)
            return samples

        return self._side_by_side(read, shard_ids)

    def read_maps(self, shard_ids: list[str], spec: Spec) -> list[NDArray[np.float16]]:
        """The maps `[n, G, G]` of shards, each in the order of its samples, read side by side.

        That there is a map a sample is for the caller to see, who knows the samples.

        Raises:
            CacheError: no whole entry, none of this spec, a damaged one, or one of another format.
        """

        async def read(shard_id: str) -> NDArray:
            (maps,) = await self._arrays(shard_id, [spec.id])
            self._check_maps(shard_id, spec.id, maps, (len(maps), spec.grid, spec.grid))
            return maps

        return self._side_by_side(read, shard_ids)

    def _side_by_side(
        self, read: Callable[[str], Coroutine[Any, Any, NDArray]], shard_ids: list[str]
    ) -> list[NDArray]:
        async def read_all() -> list[NDArray]:
            turn = asyncio.Semaphore(_CONCURRENT_READS)

            async def in_turn(shard_id: str) -> NDArray:
                async with turn:
                    return await read(shard_id)

            return await asyncio.gather(*map(in_turn, shard_ids))

        return self.run(read_all())

    def entries(self) -> Iterator[Entry]:
        """Every entry, whole or partial, in the order of shard ids."""
        for shard_id in self.objects.children("shards"):
            entry = self.entry(shard_id)
            if entry is not None:
                yield entry

    def entry(self, shard_id: str) -> Entry | None:
        """What is stored for a shard, None if nothing is."""
        arrays: dict[str, list[Stored]] = {}
        objects = list(self.objects.below(f"shards/{shard_id}"))
        for each in objects:
            name, slash, _ = each.path.removeprefix(f"shards/{shard_id}/").partition("/")
            arrays.setdefault(name if slash else "", []).append(each)
        if not objects:
            return None  # a local folder whose files were removed
        return Entry(
            shard_id=shard_id,
            whole="" in arrays,
            maps=[
                StoredMaps(
                    name,
                    any(part.path.endswith("/zarr.json") for part in parts),
                    sum(part.bytes for part in parts),
                    max(part.modified for part in parts),
                )
                for name, parts in sorted(arrays.items())
                if is_spec_id(name)
            ],
            bytes=sum(each.bytes for each in objects),
            objects=len(objects),
            modified=max(each.modified for each in objects),
        )

    def any_maps(self, shard_id: str, spec_id: str) -> NDArray[np.float16]:
        """Stored maps `[n, G, G]`, whatever made them.

        Raises:
            CacheError: there are none, or they are damaged.
        """
        (maps,) = self.run(self._arrays(shard_id, [spec_id]))
        shape = (self.summary(shard_id).kept, *maps.shape[1:])
        self._check_maps(shard_id, spec_id, maps, shape)
        return maps

    def stored_spec(self, shard_id: str, spec_id: str) -> ScoreSpec | None:
        """The spec of stored maps, or None if other code wrote them.

        Raises:
            CacheError: what is written of it is damaged, or gone.
        """
        path = f"shards/{shard_id}/{spec_id}/zarr.json"
        helps = remedy(self.url, path)
        try:
            data = self.objects.get(path)
        except FileNotFoundError:
            raise CacheError(f"{self.url}/{path} is gone. {helps}") from None
        return ScoreSpec.from_description(unseal_zarr(data, self.url, path, helps).get("spec", {}))

    async def _arrays(self, shard_id: str, names: list[str]) -> list[NDArray]:
        found = []
        for name in names:
            path = f"shards/{shard_id}/{name}"
            try:
                found.append(await read_array(self.arrays, path))
            except FileNotFoundError:
                if not self.has_entry(shard_id, None):
                    raise self._no_entry(shard_id) from None
                if name in ("samples", "key"):
                    raise self._damaged(shard_id, name, "it is gone") from None
                raise CacheError(
                    f"shard {shard_id} in {self.url} has no maps of {name}; make them with "
                    "jobs/precompute_freq.py, or a model's with jobs/refresh_scores.py"
                ) from None
        return found

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """What a coroutine that reads returns."""
        with ThreadPoolExecutor(1) as pool:  # the caller may have an event loop of its own
            return pool.submit(asyncio.run, coroutine).result()

    def _check_samples(self, shard_id: str, samples: NDArray, kept: int) -> None:
        if samples.shape != (kept, 3) or (samples[:, 1] <= 0).any():
            raise self._damaged(shard_id, "samples", f"{list(samples.shape)} for {kept} samples")

    def _check_maps(
        self, shard_id: str, spec_id: str, maps: NDArray, shape: tuple[int, ...]
    ) -> None:
        if maps.shape != shape or maps.dtype != np.float16:
            found = f"{maps.dtype} {list(maps.shape)} in place of float16 {list(shape)}"
            raise self._damaged(shard_id, spec_id, found)
        if not np.isfinite(maps).all() or not maps.any(axis=(1, 2)).all():
            raise self._damaged(shard_id, spec_id, "maps that are not finite, or zero all over")

    def _attributes(self, shard_id: str, data: bytes) -> dict[str, Any]:
        path = f"shards/{shard_id}/zarr.json"
        return unseal_zarr(data, self.url, path, remedy(self.url, path))

    def _damaged(self, shard_id: str, name: str, why: str) -> CacheError:
        path = f"shards/{shard_id}/{name}"
        return damaged(f"{self.url}/{path}", why, remedy(self.url, f"{path}/zarr.json"))

    def _no_entry(self, shard_id: str) -> CacheError:
        return CacheError(
            f"{self.url} has no whole entry for shard {shard_id}; run jobs/precompute_freq.py"
        )
