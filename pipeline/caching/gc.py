"""Garbage collection of a score cache: the only module that deletes scores from it.

A collection removes records of deleted tars from folders that still hold others, old entries that
no manifest names, and old staging files of killed writers. It deletes only names that the cache
itself gives (see `cache_store`).

**Concurrent jobs.** Objects that a job has put but not yet recorded look like garbage, and a job
may rely on garbage that it found. There are no locks; both sides act, then check:

    writer:     put what is missing -> publish a record -> check: make again what is gone
    collection: read the records    -> delete           -> check: put back what has a record now

If the deletion comes before the writer's check, the writer makes the object again. Otherwise the
record comes before the collection's check, which puts the object back. The age limit only saves
this work.

**Unreachable folders.** A folder that shows none of its recorded shards counts as unreachable and
keeps its records: its disk may not be mounted, a link may dangle, or the bucket may be another
store's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from famt.pipeline import storage
from famt.pipeline.caching.cache import Entry, ScoreCache
from famt.pipeline.caching.cache_store import TABLE
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.storage import each_at_once

KEPT = timedelta(days=7)
"""age up to which entries without a record stay"""

_BATCH = 100  # entries held in memory at a time, in case they have to be put back
_PUT = timedelta(minutes=10)  # a put takes seconds; an older staging file is a killed writer's


@dataclass(frozen=True)
class Removed:
    """An object or record that a collection removed, or would remove.

    Attributes:
        what: name in the cache, or a shard's URL.
        reason: why nothing needs it.
    """

    what: str
    reason: str
    bytes: int = 0


def collect(
    cache: ScoreCache,
    older_than: timedelta = KEPT,
    *,
    dry_run: bool = False,
    out_of_reach: dict[str, str] | None = None,
) -> Iterator[Removed]:
    """Remove what nothing needs, and yield each removal; ends when the iterator is exhausted.

    Args:
        older_than: leave younger entries, which a job may be using. Staging files stay for ten
            minutes at least.
        dry_run: remove nothing.
        out_of_reach: gets the reason for each unreachable folder.

    Raises:
        CacheError: the cache's folders hold foreign files, or a manifest is damaged. Nothing more
            is removed then.
    """
    cache.store.refuse_foreign()
    now = datetime.now(UTC)
    limit, abandoned = now - older_than, now - max(older_than, _PUT)
    # First, since a full disk has no room for a new manifest.
    for file in cache.store.staging_files():
        if file.modified <= abandoned:
            yield Removed(file.path, "a staging file", file.bytes)
            if not dry_run:
                cache.store.delete([file.path])
    unreachable = {} if out_of_reach is None else out_of_reach
    gone: dict[str, dict[str, ShardRecord]] = {}
    for folder, records in sorted(cache.manifests.folders().items()):
        gone[folder] = _records_of_deleted(folder, records, unreachable)
        for name in sorted(gone[folder]):
            yield Removed(storage.join_url(folder, name), "the tar is gone, its record goes")
        if gone[folder] and not dry_run:
            _forget(cache, folder, gone[folder])
    named = _named(cache, gone)
    doomed = [
        entry
        for entry in cache.entries()
        if entry.shard_id not in named and entry.modified <= limit
    ]
    for first in range(0, len(doomed), _BATCH):
        batch = doomed[first : first + _BATCH]
        saved = set() if dry_run else _delete(cache, batch)
        for entry in batch:
            if entry.shard_id not in saved:
                yield Removed(entry.shard_id, "no manifest names it", entry.bytes)


def _delete(cache: ScoreCache, entries: Sequence[Entry]) -> set[str]:
    """Delete entries, except those recorded meanwhile; returns the shard ids of these."""
    # Tables last, so that no maps outlive the table whose rows they follow.
    paths = [each.path for entry in entries for each in entry.objects]
    paths.sort(key=lambda path: path.endswith(f"/{TABLE}.zip"))
    read = zip(paths, each_at_once(lambda path: _bytes(cache, path), paths), strict=True)
    held = {path: data for path, data in read if data is not None}
    cache.store.delete(held)
    saved = _named(cache, {}) & {entry.shard_id for entry in entries}
    for path in reversed(held):
        if path.split("/")[1] in saved:
            cache.store.put(path, held[path])
    return saved


def _bytes(cache: ScoreCache, path: str) -> bytes | None:
    with suppress(FileNotFoundError):  # another collection was faster
        return cache.store.get(path)
    return None


def _named(cache: ScoreCache, gone: dict[str, dict[str, ShardRecord]]) -> set[str]:
    """Ids of the shards that manifests name, without the records about to be dropped."""
    return {
        record.shard_id
        for folder, records in cache.manifests.folders().items()
        for name, record in records.items()
        if gone.get(folder, {}).get(name) != record
    }


def _records_of_deleted(
    folder: str, records: dict[str, ShardRecord], unreachable: dict[str, str]
) -> dict[str, ShardRecord]:
    """Records of a folder's deleted tars; none if the folder is unreachable."""
    try:
        present = storage.list_names(folder)
    except storage.UNREACHABLE as error:
        unreachable[folder] = storage.reason(error)
        return {}
    if records and present.isdisjoint(records):
        unreachable[folder] = (
            f"{folder} holds none of its {len(records)} shards, as if its disk were not mounted or "
            "it were another store's"
        )
        return {}
    return {name: record for name, record in records.items() if name not in present}


def _forget(cache: ScoreCache, folder: str, gone: dict[str, ShardRecord]) -> None:
    """Drop records of tars, and restore those of tars that are back meanwhile."""
    cache.manifests.forget(folder, gone)
    try:
        present = storage.list_names(folder)
    except storage.UNREACHABLE:
        present = set(gone)
    cache.manifests.publish(
        {storage.join_url(folder, name): gone[name] for name in present & gone.keys()}
    )
