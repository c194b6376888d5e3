"""Decide for which shards the cached data is valid, and what the others lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.storage import each_at_once


@dataclass(frozen=True)
class Stale:
    """Why the cached data of a shard is not valid.

    Attributes:
        lacks: "file" itself; a "record" of it; the "hash" of a file that changed, maybe only in its
            times; its "table"; "maps" of the score asked for.
        reason: the same, in words.
    """

    lacks: Literal["file", "record", "hash", "table", "maps"]
    reason: str


@dataclass(frozen=True)
class Shards:
    """Records and gaps of shards, by URL; each shard has a record, or is stale, or both."""

    records: dict[str, ShardRecord]
    stale: dict[str, Stale]


def look_up(urls: Sequence[str], cache: ScoreCache, spec: ScoreSpec | None) -> Shards:
    """Compare the cache with shards as they are now.

    Args:
        urls: normalised.
        spec: also ask for maps of this score.

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
        if not cache.has(record.shard_id):
            return Stale("table", f"the score cache {cache.url} has no table of it")
        if spec is not None and not cache.has(record.shard_id, spec):
            return Stale("maps", f"the score cache {cache.url} has no maps of {spec.id} for it")
        return None

    found = dict(zip(urls, each_at_once(lack, urls), strict=True))
    return Shards(records, {url: stale for url, stale in found.items() if stale})
