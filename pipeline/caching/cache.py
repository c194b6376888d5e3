"""The score cache: content-addressed objects, shared by all experiments.

    <cache>/shards/<shard id>/table.zip       a zarr group, zipped:
        samples                               int64 [n, 3]: offset, size, label, in tar order
        key                                   string [n]
        attributes                            bytes, damage, quarantined (key and reason of each),
                                              passed_over (ending -> number of other files)
    <cache>/shards/<shard id>/<spec id>.zip   another:
        maps                                  float16 [n, G, G]
        attributes                            spec, spelled out
    <cache>/datasets/<folder>/<version>.json  for a folder of shards: name -> size, stamp, shard id

A shard id is the hash of the tar's bytes, a spec id that of the score's definition. So an object
never changes: all writers write the same bytes, up to rounding. It is put whole, with a checksum
(see `cache_store`). Only `famt.pipeline.caching.gc` deletes scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from famt.pipeline.caching.cache_store import TABLE, CacheStore, Stored, is_spec_id
from famt.pipeline.caching.manifest import Manifests
from famt.pipeline.caching.zarr_zip import Group
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.sharding.shards import Rejected


@dataclass(frozen=True)
class ShardTable:
    """The contents of a shard: a row for each sample kept, in tar order, and what was left out.

    Attributes:
        key: sample names.
        samples: int64 `[n, 3]`: offset and size of the image's bytes in the tar, and its label, -1
            where it has none.
        rejected: quarantined images, with reasons.
        bytes: size of the tar.
        damage: what is wrong with the tar itself, or None.
        passed_over: number of files that belong to no image, by ending.
    """

    key: list[str]
    samples: NDArray[np.int64]
    rejected: list[Rejected]
    bytes: int
    damage: str | None
    passed_over: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Number of samples that enter training."""
        return len(self.key)

    def same_rows(self, other: ShardTable) -> bool:
        """Whether both tables list the same samples in the same order."""
        return self.key == other.key and np.array_equal(self.samples, other.samples)


@dataclass(frozen=True)
class Entry:
    """The objects stored for one shard.

    Attributes:
        table: whether its table is stored.
        specs: ids of the scores whose maps are stored, sorted.
    """

    shard_id: str
    table: bool
    specs: list[str]
    objects: list[Stored]

    @property
    def bytes(self) -> int:
        """Size in the store."""
        return sum(each.bytes for each in self.objects)

    @property
    def modified(self) -> datetime:
        """When the newest object was put."""
        return max(each.modified for each in self.objects)


class ScoreCache:
    """A score cache at a local path or an object-store URL.

    Args:
        url: its root folder.
        create: open for writing; makes a missing local root.

    Attributes:
        store: its objects.
        manifests: which shard of which folder has which entry.

    Raises:
        UserError: an empty URL.
        FileNotFoundError: no such local root, without `create`.
        OSError: the root can't be made.
        CacheError: with `create`, the root's folders hold foreign files.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        if not url:
            raise UserError("the score cache has no name; give a folder or URL as --cache")
        try:
            self.store = CacheStore(url, create=create)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{url}: no score cache there; is it spelled right? One is made with "
                f"`famt score --shards ... --cache {url}`"
            ) from None
        self.url = self.store.url
        self.manifests = Manifests(self.store)
        if create:
            self.store.refuse_foreign()

    def __reduce__(self) -> tuple[type[ScoreCache], tuple[str]]:
        return ScoreCache, (self.url,)  # to Ray workers without the store, which holds connections

    def has(self, shard_id: str, spec: ScoreSpec | None = None) -> bool:
        """Whether the shard's maps of `spec` are stored, or without a spec its table."""
        return self.store.exists(_path(shard_id, spec.id if spec else TABLE))

    def write(
        self, shard_id: str, table: ShardTable, spec: ScoreSpec, maps: NDArray[np.float16]
    ) -> None:
        """Put a shard's table as `write_table` does, then maps `[n, G, G]`, a row a sample.

        Raises:
            ValueError: maps that do not fit the table and spec, or are not finite, or zero.
        """
        _check_maps(shard_id, spec, maps, table.kept)
        self.write_table(shard_id, table)
        self.store.put_group(_path(shard_id, spec.id), {"spec": spec.describe()}, {"maps": maps})

    def write_table(self, shard_id: str, table: ShardTable) -> None:
        """Put a shard's table unless it is stored.

        Raises:
            UserError: the stored table, whose rows stored maps follow, has other samples.
            CacheError: the stored table is damaged.
            CacheFullError: no room is left.
            OSError: the store refused.
        """
        known = self.find_table(shard_id)
        if known is not None:
            if not known.same_rows(table):
                raise UserError(
                    f"shard {shard_id}: these are other samples than {self.url} keeps of it"
                )
            return
        attributes = {
            "bytes": table.bytes,
            "damage": table.damage,
            "quarantined": [asdict(bad) for bad in table.rejected],
            "passed_over": table.passed_over,
        }
        arrays = {
            "samples": table.samples,
            "key": np.array(table.key, dtype=np.dtypes.StringDType()),
        }
        self.store.put_group(_path(shard_id, TABLE), attributes, arrays)

    def find_table(self, shard_id: str) -> ShardTable | None:
        """The table of a shard, or None; a CacheError if it is damaged."""
        try:
            return _table(self.store.get_group(_path(shard_id, TABLE)))
        except FileNotFoundError:
            return None

    def read_table(self, shard_id: str) -> ShardTable:
        """The table of a shard; a CacheError if there is none, or it is damaged."""
        return _table(self._group(shard_id, TABLE))

    def read_samples(self, shard_id: str) -> NDArray[np.int64]:
        """Offset, size and label `[n, 3]` of a shard's samples; errors as of `read_table`."""
        return self._group(shard_id, TABLE).numbers("samples", np.int64, 3)

    def read_maps(self, shard_id: str, spec: ScoreSpec) -> NDArray[np.float16]:
        """The maps `[n, G, G]` of a shard, a row a sample; errors as of `read_table`."""
        return self._group(shard_id, spec.id).numbers("maps", np.float16, spec.grid, spec.grid)

    def stored_spec(self, shard_id: str, spec_id: str) -> ScoreSpec | None:
        """The spec of stored maps, or None if code of another version wrote them."""
        return ScoreSpec.from_description(self._group(shard_id, spec_id).attributes["spec"])

    def _group(self, shard_id: str, name: str) -> Group:
        try:
            return self.store.get_group(_path(shard_id, name))
        except FileNotFoundError:
            what = "table" if name == TABLE else f"maps of {name}"
            raise CacheError(
                f"{self.url} has no {what} for shard {shard_id}; run `famt score`"
            ) from None

    def entries(self) -> Iterator[Entry]:
        """All entries, sorted by shard id."""
        objects: dict[str, list[Stored]] = {}
        for each in self.store.below("shards"):
            objects.setdefault(each.path.split("/")[1], []).append(each)
        for shard_id, held in sorted(objects.items()):
            names = {each.path.rpartition("/")[2].removesuffix(".zip") for each in held}
            yield Entry(shard_id, TABLE in names, sorted(names - {TABLE}), held)


def _path(shard_id: str, name: str) -> str:
    return f"shards/{shard_id}/{name}.zip"


def _check_maps(shard_id: str, spec: ScoreSpec, maps: NDArray[np.float16], kept: int) -> None:
    shape = (kept, spec.grid, spec.grid)
    if maps.shape != shape or maps.dtype != np.float16 or not np.isfinite(maps).all():
        raise ValueError(
            f"shard {shard_id}: maps of {spec.id} must be finite float16 {list(shape)}, "
            f"got {maps.dtype} {list(maps.shape)}"
        )
    if not maps.any(axis=(1, 2)).all():
        raise ValueError(f"shard {shard_id}: a map of {spec.id} is zero all over")
    if not is_spec_id(spec.id):
        raise UserError(
            f"a score can't be named {spec.kind!r}: use letters, digits, _, . and - alone"
        )


def _table(group: Group) -> ShardTable:
    attributes = group.attributes
    return ShardTable(
        key=group.strings("key"),
        samples=group.numbers("samples", np.int64, 3),
        rejected=[Rejected(**bad) for bad in attributes["quarantined"]],
        bytes=attributes["bytes"],
        damage=attributes["damage"],
        passed_over=attributes["passed_over"],
    )
