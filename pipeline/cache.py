"""The score cache: content-addressed zarr entries that all experiments share.

This module, `pipeline.manifest` and `pipeline.generations` alone know the layout:

    <cache>/shards/<shard id>/zarr.json       a zarr group; attributes: format, columns, bytes,
                                              damage, kept, quarantined (key and reason of each)
    <cache>/shards/<shard id>/samples         int64 [n, 3]: offset, size, label, in tar order
    <cache>/shards/<shard id>/key             string [n]
    <cache>/shards/<shard id>/<spec id>       float16 [n, G, G]; attributes: the spec, spelled out
    <cache>/datasets/<folder>/<version>.json  for a folder of shards: name -> size, stamp, shard id

A shard id is the hash of the tar's bytes and a spec id that of the score's definition, so an entry
never changes and whoever writes it writes the same bytes. An object is put whole, data before
metadata: an array or group whose `zarr.json` exists is complete, and two writers can't harm each
other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import obstore
import zarr
import zarr.api.asynchronous
from numpy.typing import NDArray
from zarr.storage import MemoryStore, ObjectStore

from pipeline import storage
from pipeline.generations import Generations
from pipeline.manifest import FORMAT, CacheError, Manifests, check_format
from pipeline.scores import ScoreSpec, Spec
from pipeline.shards import Rejected

_CONCURRENT_READS = 64


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
    """

    key: list[str]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    rejected: list[Rejected]
    bytes: int
    damage: str | None


@dataclass(frozen=True)
class ShardSummary:
    """A shard's table in numbers.

    Attributes:
        kept: samples that enter training.
        rejected: those that do not, with reasons; with `kept`, all that were seen.
        bytes: size of the tar.
        damage: what is wrong with the tar itself, or None.
    """

    kept: int
    rejected: list[Rejected]
    bytes: int
    damage: str | None


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
        create: make a local root that is not there.

    Attributes:
        manifests: which shard of which folder has which entry.
        generations: which maps belong to which moment of which training run.

    Raises:
        FileNotFoundError: a local root that is not there, without `create`.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = storage.normalise_url(url)
        try:
            self._store = storage.open_store(self.url, create=create)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.url}: no score cache there; make one with `python jobs/precompute_freq.py`"
            ) from None
        self.manifests = Manifests(self._store, self.url)
        self.generations = Generations(self._store, self.url)

    # Pickled to Ray workers: a store holds connections, its URL says all.
    def __getstate__(self) -> str:
        return self.url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]

    def has_entry(self, shard_id: str, spec: Spec | None) -> bool:
        """Whether the shard's table is there, whole, and its maps of `spec` if one is given."""
        entry = f"shards/{shard_id}"
        return self._exists(f"{entry}/zarr.json") and (
            spec is None or self._exists(f"{entry}/{spec.id}/zarr.json")
        )

    def write(
        self, shard_id: str, table: ShardTable, spec: Spec, maps: NDArray[np.float16]
    ) -> None:
        """Put a shard's entry, or only the maps if its table is there already.

        Raises:
            ValueError: maps that do not fit the table and spec, or are not finite; a table that
                differs from the stored one, which other maps go by.
            OSError: the store refused, a full disk say; nothing half-written is readable.
        """
        shape = (len(table.label), spec.grid, spec.grid)
        if maps.shape != shape or maps.dtype != np.float16 or not np.isfinite(maps).all():
            raise ValueError(
                f"shard {shard_id}: maps of {spec.id} must be finite float16 {list(shape)}, "
                f"got {maps.dtype} {list(maps.shape)}"
            )
        stored = self.read_table(shard_id) if self.has_entry(shard_id, None) else None
        if stored is not None and stored.key != table.key:
            raise ValueError(
                f"shard {shard_id}: maps of {spec.id} are for other samples than {self.url} keeps"
            )
        objects: dict[str, zarr.core.buffer.Buffer] = {}
        group = zarr.create_group(
            MemoryStore(store_dict=objects),
            attributes={
                "format": FORMAT,
                "columns": ["offset", "size", "label"],
                "bytes": table.bytes,
                "kept": len(table.label),
                "damage": table.damage,
                "quarantined": [asdict(bad) for bad in table.rejected],
            },
        )
        samples = np.stack([table.offset, table.size, table.label], axis=1)
        names = np.array(table.key, dtype=np.dtypes.StringDType())
        _add_array(group, "samples", samples)
        _add_array(group, "key", names)
        _add_array(group, spec.id, maps, {"spec": spec.describe()})
        # Data first, then each array's metadata, then the group's, which completes the entry.
        order = sorted(objects, key=lambda name: (name.endswith("zarr.json"), -name.count("/")))
        for name in order:
            if stored is None or name.startswith(f"{spec.id}/"):
                storage.put(self._store, f"shards/{shard_id}/{name}", objects[name].to_bytes())

    def read_table(self, shard_id: str) -> ShardTable:
        """The table of a shard.

        Raises:
            CacheError: no whole entry, or one of a newer format.
        """
        summary = self.summary(shard_id)
        offset, size, label = self._array(shard_id, "samples").T
        return ShardTable(
            key=[str(key) for key in self._array(shard_id, "key")],
            offset=offset,
            size=size,
            label=label,
            rejected=summary.rejected,
            bytes=summary.bytes,
            damage=summary.damage,
        )

    def summary(self, shard_id: str) -> ShardSummary:
        """What a shard's entry says of itself, from its metadata alone.

        Raises:
            CacheError: no whole entry, or one of a newer format.
        """
        try:
            text = obstore.get(self._store, f"shards/{shard_id}/zarr.json").bytes()
        except FileNotFoundError:
            raise self._no_entry(shard_id) from None
        attributes = self._attributes(shard_id, bytes(text))
        return ShardSummary(
            kept=attributes["kept"],
            rejected=[Rejected(**bad) for bad in attributes["quarantined"]],
            bytes=attributes["bytes"],
            damage=attributes["damage"],
        )

    def read_samples(self, shard_ids: list[str]) -> list[NDArray[np.int64]]:
        """Offset, size and label `[n, 3]` of the samples that shards keep, read side by side.

        Raises:
            CacheError: no whole entry, or one of another format.
        """
        samples = self._read_side_by_side(shard_ids, "samples")
        for shard_id, rows in zip(shard_ids, samples, strict=True):
            # zarr reads a chunk that is gone as zeros, and no size is zero.
            if (rows[:, 1] <= 0).any():
                raise self._damaged(shard_id)
        return samples

    def read_maps(self, shard_ids: list[str], spec: Spec) -> list[NDArray[np.float16]]:
        """The maps `[n, G, G]` of shards, each in the order of its samples, read side by side.

        Raises:
            CacheError: no whole entry, none of this spec, or one of another format.
        """
        maps = self._read_side_by_side(shard_ids, spec.id)
        for shard_id, each in zip(shard_ids, maps, strict=True):
            if not each.any(axis=(1, 2)).all():  # as above: no map is all zeros
                raise self._damaged(shard_id)
        return maps

    def _read_side_by_side(self, shard_ids: list[str], name: str) -> list[NDArray]:
        store = ObjectStore(self._store, read_only=True)

        async def read(shard_id: str, turn: asyncio.Semaphore) -> NDArray:
            async with turn:
                try:
                    text = await obstore.get_async(self._store, f"shards/{shard_id}/zarr.json")
                    attributes = self._attributes(shard_id, bytes(await text.bytes_async()))
                except FileNotFoundError:
                    raise self._no_entry(shard_id) from None
                try:
                    array = await zarr.api.asynchronous.open_array(
                        store=store, path=f"shards/{shard_id}/{name}", mode="r", zarr_format=3
                    )
                except FileNotFoundError:
                    raise CacheError(
                        f"shard {shard_id} in {self.url} has no maps of {name}"
                    ) from None
                values = np.asarray(await array.getitem(...))
                if len(values) != attributes["kept"]:
                    raise self._damaged(shard_id)
                return values

        async def read_all() -> list[NDArray]:
            turn = asyncio.Semaphore(_CONCURRENT_READS)
            return await asyncio.gather(*(read(shard_id, turn) for shard_id in shard_ids))

        with ThreadPoolExecutor(1) as pool:  # the caller may have an event loop of its own
            return pool.submit(asyncio.run, read_all()).result()

    def _damaged(self, shard_id: str) -> CacheError:
        return CacheError(
            f"shard {shard_id} in {self.url} is damaged: an object of it is gone. "
            f"Remove {self.url}/shards/{shard_id} and run jobs/precompute_freq.py again"
        )

    def entries(self) -> Iterator[Entry]:
        """Every entry, whole or partial, in the order of shard ids."""
        for prefix in obstore.list_with_delimiter(self._store, "shards")["common_prefixes"]:
            objects = [meta for part in obstore.list(self._store, prefix) for meta in part]
            if not objects:
                continue  # a local folder whose files were removed
            names = {meta["path"].removeprefix(f"{prefix}/") for meta in objects}
            folders = {name.partition("/")[0] for name in names if "/" in name}
            maps = []
            for name in sorted(folders - {"samples", "key"}):
                parts = [meta for meta in objects if meta["path"].startswith(f"{prefix}/{name}/")]
                maps.append(
                    StoredMaps(
                        name,
                        f"{name}/zarr.json" in names,
                        sum(meta["size"] for meta in parts),
                        max(meta["last_modified"] for meta in parts),
                    )
                )
            yield Entry(
                shard_id=prefix.rpartition("/")[2],
                whole="zarr.json" in names,
                maps=maps,
                bytes=sum(meta["size"] for meta in objects),
                objects=len(objects),
                modified=max(meta["last_modified"] for meta in objects),
            )

    def remove(
        self, shard_id: str, spec_id: str | None = None, *, limit: datetime | None = None
    ) -> None:
        """Delete an entry, or only its maps of one spec; the object that makes it whole first.

        With a `limit`, nothing is deleted if any of it is newer: a writer is at work on it.
        """
        folder = f"shards/{shard_id}" if spec_id is None else f"shards/{shard_id}/{spec_id}"
        objects = [meta for part in obstore.list(self._store, folder) for meta in part]
        if limit is not None and any(meta["last_modified"] > limit for meta in objects):
            return
        paths = [meta["path"] for meta in objects]
        root = f"{folder}/zarr.json"
        if root in paths:
            obstore.delete(self._store, root)
        obstore.delete(self._store, [path for path in paths if path != root])

    def stored_spec(self, shard_id: str, spec_id: str) -> ScoreSpec | None:
        """The spec of stored maps, or None if other code wrote them."""
        text = obstore.get(self._store, f"shards/{shard_id}/{spec_id}/zarr.json").bytes()
        return ScoreSpec.from_description(json.loads(bytes(text))["attributes"]["spec"])

    def _array(self, shard_id: str, name: str) -> NDArray:
        store = ObjectStore(self._store, read_only=True)
        path = f"shards/{shard_id}/{name}"
        return np.asarray(zarr.open_array(store, path=path, mode="r", zarr_format=3)[:])

    def _attributes(self, shard_id: str, text: bytes) -> dict[str, Any]:
        attributes: dict[str, Any] = json.loads(text)["attributes"]
        check_format(attributes["format"], f"shard {shard_id} in {self.url}")
        return attributes

    def _no_entry(self, shard_id: str) -> CacheError:
        return CacheError(f"{self.url} has no whole entry for shard {shard_id}")

    def _exists(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True


def _add_array(group: zarr.Group, name: str, data: NDArray, attributes: dict | None = None) -> None:
    """One array in one chunk; zarr refuses chunks without extent, so an empty one gets a length."""
    chunks = tuple(max(1, extent) for extent in data.shape)
    group.create_array(name, data=data, chunks=chunks, attributes=attributes)
