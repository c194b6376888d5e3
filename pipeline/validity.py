"""Which shards the cache is valid for: the one place that decides what it lacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache
from famt.pipeline.manifest import ShardRecord
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.storage import each_at_once


@dataclass(frozen=True)
class Stale:
    """Why the cache is not valid for a shard.

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


def look_up(urls: Sequence[str], cache: ScoreCache, spec: ScoreSpec | None) -> Shards:
    """What the cache knows of shards as they are now, and lacks of them.

    Args:
        urls: normalised.
        spec: a score whose maps are wanted too.

    Raises:
        CacheError: a manifest is damaged.
        OSError: a store or disk is out of reach.
    """
    records = cache.manifests.lookup(urls)
    versions = storage.versions(urls)

    def lack(url: str) -> Stale | None:
        record = records.get(url)
        if url not in versions:
            return Stale("file", "no such file")
        if record is None:
            return Stale("record", f"the score cache {cache.url} does not know this shard")
        if versions[url] != record.version:
            return Stale("hash", f"changed since its scores were put into {cache.url}")
        if not cache.has_table(record.shard_id):
            return Stale("table", f"the score cache {cache.url} has no table of it")
        if spec is not None and not cache.has_maps(record.shard_id, spec):
            return Stale("maps", f"the score cache {cache.url} has no maps of {spec.id} for it")
        return None

    found = dict(zip(urls, each_at_once(lack, urls), strict=True))
    return Shards(records, {url: stale for url, stale in found.items() if stale})
