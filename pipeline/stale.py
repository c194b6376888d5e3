"""What the cache lacks of shards: the one place that decides whether it can be gone by."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from pipeline import storage
from pipeline.cache import ScoreCache
from pipeline.manifest import ShardRecord
from pipeline.scores import Spec


@dataclass(frozen=True)
class Stale:
    """Why the cache can't be gone by for a shard.

    Attributes:
        lacks: the file itself; a record of it; one of the file as it is now, which a hash tells if
            only its times changed; its table; maps of the score that was asked for.
        reason: the same, for people.
    """

    lacks: Literal["file", "record", "hash", "table", "maps"]
    reason: str


@dataclass(frozen=True)
class Shards:
    """What the cache knows of shards, URL by URL: all have a record, or are stale, or both."""

    records: dict[str, ShardRecord]
    stale: dict[str, Stale]


def look_up(urls: Sequence[str], cache: ScoreCache, spec: Spec | None) -> Shards:
    """What the cache knows of shards as they are now, and lacks of them.

    Args:
        urls: normalised.
        spec: a score whose maps are wanted too.

    Raises:
        CacheError: a manifest is damaged.
        OSError: a store or disk is out of reach.
    """
    records = cache.manifests.lookup(urls)
    with ThreadPoolExecutor(32) as pool:
        reasons = pool.map(lambda url: _staleness(url, records.get(url), cache, spec), urls)
        stale = {url: each for url, each in zip(urls, reasons, strict=True) if each}
    return Shards(records, stale)


def _staleness(
    url: str, record: ShardRecord | None, cache: ScoreCache, spec: Spec | None
) -> Stale | None:
    try:
        version = storage.version(url)
    except FileNotFoundError:
        return Stale("file", "no such file")
    if record is None:
        return Stale("record", f"the score cache {cache.url} does not know this shard")
    if version != record.version:
        return Stale("hash", f"changed since its scores were put into {cache.url}")
    if not cache.has_entry(record.shard_id, None):
        return Stale("table", f"the score cache {cache.url} has no whole entry for it")
    if spec is not None and not cache.has_entry(record.shard_id, spec):
        return Stale("maps", f"the score cache {cache.url} has no maps of {spec.id} for it")
    return None
