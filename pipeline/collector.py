"""What deletes from a score cache: nothing else in this project does.

A collection removes

- records of shards whose tars were deleted from a folder that still holds others of it,
- generations of maps that no run needs, and the maps that no generation names any more,
- entries that no manifest names, entries and maps that were never finished, staging files,
- packs of which most is named by no manifest or lies in other packs, damaged and unfinished ones,

and never anything that a manifest, a generation or a run's list of needed ones names, whichever
job made it. Only objects whose names the cache gives are deleted (`famt.pipeline.objects`).

**Beside jobs at work.** What a job has put but not yet named looks like what nobody needs. A writer
claims what it is at work on, and a collection announces what it is about to delete, each before it
looks what the other does (`famt.pipeline.notices`): either the collection sees the claim and keeps
the objects, or the writer waits until they are gone and makes them again. That only objects of some
age go saves work, not data.

**Folders out of reach.** A disk that is not mounted, a link that leads nowhere, another store's
empty bucket of that name: a folder in which none of its recorded shards is to be seen is taken for
out of reach, and keeps its records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from famt.pipeline import storage
from famt.pipeline.cache import Entry, ScoreCache
from famt.pipeline.generations import Generation
from famt.pipeline.manifest import ShardRecord
from famt.pipeline.notices import Claimed
from famt.pipeline.packs import useful_packs
from famt.pipeline.scores import is_generation

_BATCH = 500  # entries a notice speaks of; they go within seconds
_PUT = timedelta(minutes=10)  # a put takes seconds; an older staging file is a killed writer's


@dataclass(frozen=True)
class Removed:
    """Something that a collection removed, or would remove.

    Attributes:
        what: its name in the cache, or a shard's URL.
        reason: why nothing needs it.
        bytes: that it took.
    """

    what: str
    reason: str
    bytes: int = 0


@dataclass(frozen=True)
class Collection:
    """Which things to collect.

    Attributes:
        older_than: leave what is younger, in case a job is at work on it. Of staging files those of
            ten minutes stay whatever it is: a live writer may be about to give them their names.
        drop_runs: training runs that are over for good: their generations go, and what they need of
            others' as well.
        dry_run: remove nothing, only say what would go.
        out_of_reach: filled with folder -> reason, for those whose shards could not be looked for.
    """

    older_than: timedelta = timedelta(hours=24)
    drop_runs: tuple[str, ...] = ()
    dry_run: bool = False
    out_of_reach: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Named:
    """What must stay.

    Attributes:
        shards: ids that manifests name.
        specs: ids that generations name.
        claimed: what writers are at work on.
    """

    shards: set[str]
    specs: set[str]
    claimed: Claimed


@dataclass(frozen=True)
class _Doomed:
    """An entry, or its maps of one spec, that nothing needs."""

    shard_id: str
    spec_id: str | None
    removed: Removed


def collect(cache: ScoreCache, options: Collection) -> Iterator[Removed]:
    """Remove from a cache what nothing needs; yields it, all of it once the iterator ends.

    Raises:
        CacheError: the cache holds what is not its own, or what tells what is needed is damaged;
            nothing more is removed then.
    """
    cache.objects.refuse_foreign()
    now = datetime.now(UTC)
    limit, abandoned = now - options.older_than, now - max(options.older_than, _PUT)
    for file in cache.objects.staging_files():  # first: a full disk takes no notice
        if file.modified <= abandoned:
            yield Removed(file.path, "a staging file", file.bytes)
            if not options.dry_run:
                cache.objects.delete_staging(file)
    for path in cache.claims.outdated():
        yield Removed(path, "a killed writer's claim")
        if not options.dry_run:
            cache.objects.delete([path])
    gone: dict[str, dict[str, ShardRecord]] = {}
    for folder, records in sorted(cache.manifests.folders().items()):
        gone[folder] = _records_of_deleted(folder, records, options)
        for name in sorted(gone[folder]):
            yield Removed(storage.join_url(folder, name), "the tar is gone, its record goes")
        if gone[folder] and not options.dry_run:
            _forget(cache, folder, gone[folder])
    old: list[Generation] = []
    for run in cache.generations.runs():
        old += cache.generations.superseded(run, gone=options.drop_runs)
    for each in old:
        yield Removed(f"generation {each.run}/{each.step}", "no run needs it")
    if not options.dry_run:
        _forget_generations(cache, old, options.drop_runs)
        for run in cache.generations.runs() if options.drop_runs else ():
            cache.objects.delete(cache.generations.idle_needs(run, gone=options.drop_runs))
    named = _named(cache, gone, old)
    doomed = (each for entry in cache.entries() for each in _doomed(entry, named, limit))
    if options.dry_run:
        yield from (each.removed for each in doomed)
    else:
        yield from _delete(cache, list(doomed), limit)
    yield from _delete_packs(cache, named.shards, limit, options)


def collect_superseded(cache: ScoreCache, run: str, shard_ids: Iterable[str]) -> list[Removed]:
    """Remove a run's superseded generations, and their maps of those shards that no other names."""
    old = _forget_generations(cache, cache.generations.superseded(run), ())
    specs = {spec.id for each in old for spec in each.specs}
    doomed = [
        _Doomed(shard_id, maps.spec_id, Removed(f"{shard_id}/{maps.spec_id}", "superseded"))
        for shard_id in (shard_ids if specs else ())
        if (entry := cache.entry(shard_id)) is not None
        for maps in entry.maps
        if maps.spec_id in specs
    ]
    return list(_delete(cache, doomed, datetime.max.replace(tzinfo=UTC)))


def _records_of_deleted(
    folder: str, records: dict[str, ShardRecord], options: Collection
) -> dict[str, ShardRecord]:
    """Records of a folder's tars that were deleted; none if the folder is out of reach."""
    try:
        present = storage.list_names(folder)
    except storage.UNREACHABLE as error:
        options.out_of_reach[folder] = storage.reason(error)
        return {}
    if records and present.isdisjoint(records):
        options.out_of_reach[folder] = (
            f"{folder} holds none of its {len(records)} shards, as if its disk were not mounted or "
            "it were another store's"
        )
        return {}
    return {name: record for name, record in records.items() if name not in present}


def _forget(cache: ScoreCache, folder: str, gone: dict[str, ShardRecord]) -> None:
    """Drop records of tars, unless they are back meanwhile: then nobody published them anew."""
    cache.manifests.forget(folder, gone)
    try:
        present = storage.list_names(folder)
    except storage.UNREACHABLE:
        present = set(gone)
    cache.manifests.publish(
        {storage.join_url(folder, name): gone[name] for name in present & gone.keys()}
    )


def _forget_generations(
    cache: ScoreCache, old: list[Generation], drop_runs: tuple[str, ...]
) -> list[Generation]:
    """Make generations unknown, unless a run has come to need one; returns those that went."""
    gone: list[Generation] = []
    if not old:
        return gone
    with cache.notices.posted([cache.generations.path(each) for each in old]) as in_time:
        runs = {each.run for each in old}
        still = [each for run in runs for each in cache.generations.superseded(run, gone=drop_runs)]
        for each in old:
            if each in still and in_time():
                cache.objects.delete([cache.generations.path(each)])
                gone.append(each)
    return gone


def _named(
    cache: ScoreCache, gone: dict[str, dict[str, ShardRecord]], old: list[Generation]
) -> _Named:
    """What manifests and generations name, but for what is going to be forgotten."""
    claimed = cache.claims.held()  # first: a writer gives its claim up when a manifest has the name
    shards = {
        record.shard_id
        for folder, records in cache.manifests.folders().items()
        for name, record in records.items()
        if gone.get(folder, {}).get(name) != record
    }
    generations = [each for run in cache.generations.runs() for each in cache.generations.of(run)]
    specs = {spec.id for each in generations if each not in old for spec in each.specs}
    return _Named(shards, specs, claimed)


def _doomed(entry: Entry, named: _Named, limit: datetime) -> Iterator[_Doomed]:
    """What of an entry nothing needs and nobody was at work on lately."""
    if entry.shard_id in named.claimed.shards:
        return
    claimed = named.claimed.specs & {maps.spec_id for maps in entry.maps}
    needed = entry.whole and entry.shard_id in named.shards
    if not (needed or claimed) and named.specs.isdisjoint(entry.specs):
        if entry.modified <= limit:
            reason = "no manifest names it" if entry.whole else "only partly written"
            yield _Doomed(entry.shard_id, None, Removed(entry.shard_id, reason, entry.bytes))
        return
    for maps in entry.maps:
        orphan = is_generation(maps.spec_id) and maps.spec_id not in named.specs
        if maps.modified <= limit and (orphan or not maps.whole) and maps.spec_id not in claimed:
            reason = "of no generation" if maps.whole else "unfinished"
            what = f"{entry.shard_id}/{maps.spec_id}"
            yield _Doomed(entry.shard_id, maps.spec_id, Removed(what, reason, maps.bytes))


def _delete(cache: ScoreCache, doomed: list[_Doomed], limit: datetime) -> Iterator[Removed]:
    """Delete what still is doomed once others can know that it is going to be."""
    left = doomed
    while left:
        batch, left = left[:_BATCH], left[_BATCH:]
        paths = [_folder(each) for each in batch]
        with cache.notices.posted(paths) as in_time, ThreadPoolExecutor(8) as pool:
            named = _named(cache, {}, [])
            one = partial(_delete_one, cache, named=named, limit=limit, in_time=in_time)
            done = list(pool.map(one, batch))
        yield from (each.removed for each, gone in zip(batch, done, strict=True) if gone)
        left += [each for each, gone in zip(batch, done, strict=True) if gone is None]


def _delete_one(
    cache: ScoreCache, each: _Doomed, *, named: _Named, limit: datetime, in_time: Callable[[], bool]
) -> bool | None:
    """Whether it was deleted; None if the time that the notice gave was over."""
    entry = cache.entry(each.shard_id)
    still = [] if entry is None else [(d.shard_id, d.spec_id) for d in _doomed(entry, named, limit)]
    if (each.shard_id, each.spec_id) not in still:
        return False
    return True if _delete_whole(cache, _folder(each), in_time) else None


def _delete_packs(
    cache: ScoreCache, named: set[str], limit: datetime, options: Collection
) -> Iterator[Removed]:
    """Delete packs that hardly help; without a notice, since whoever misses one reads entries."""
    useful = {pack.folder for pack in useful_packs(cache, named)}
    for name in cache.objects.children("packs"):
        objects = list(cache.objects.below(f"packs/{name}"))
        if f"packs/{name}" in useful or any(each.modified > limit for each in objects):
            continue
        size = sum(each.bytes for each in objects)
        if size:  # else a local folder whose files were removed
            yield Removed(f"packs/{name}", "a pack that hardly anything needs", size)
        if not options.dry_run:
            _delete_whole(cache, f"packs/{name}", lambda: True)


def _delete_whole(cache: ScoreCache, folder: str, in_time: Callable[[], bool]) -> bool:
    """Delete what makes a folder whole first: whatever is left of it is known to be unfinished."""
    paths = [stored.path for stored in cache.objects.below(folder)]
    root = f"{folder}/zarr.json"
    for part in (
        [path for path in paths if path == root],
        [path for path in paths if path != root],
    ):
        if not in_time():
            return False
        cache.objects.delete(part)
    return True


def _folder(each: _Doomed) -> str:
    return f"shards/{each.shard_id}" + ("" if each.spec_id is None else f"/{each.spec_id}")
