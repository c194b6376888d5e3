"""What the cache lacks of shards: the one place that decides whether it can be gone by."""

from __future__ import annotations

from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache
from famt.pipeline.manifest import ShardRecord
from famt.pipeline.scores import Spec


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


def look_up(
    urls: Sequence[str], cache: ScoreCache, spec: Spec | None, at_hand: Container[str] = ()
) -> Shards:
    """What the cache knows of shards as they are now, and lacks of them.

    Args:
        urls: normalised.
        spec: a score whose maps are wanted too.
        at_hand: ids of shards whose entries are not looked for: all that is wanted is in packs.

    Raises:
        CacheError: a manifest is damaged.
        OSError: a store or disk is out of reach.
    """
    records = cache.manifests.lookup(urls)
    versions = storage.versions(urls)
    stale: dict[str, Stale | None] = {}
    to_be_seen: dict[str, str] = {}
    for url in urls:
        record = records.get(url)
        if url not in versions:
            stale[url] = Stale("file", "no such file")
        elif record is None:
            stale[url] = Stale("record", f"the score cache {cache.url} does not know this shard")
        elif versions[url] != record.version:
            stale[url] = Stale("hash", f"changed since its scores were put into {cache.url}")
        elif record.shard_id not in at_hand:
            stale[url] = None  # in its place among the others
            to_be_seen[url] = record.shard_id
    with ThreadPoolExecutor(32) as pool:
        lacking = pool.map(lambda shard_id: _lacking(shard_id, cache, spec), to_be_seen.values())
        stale |= zip(to_be_seen, lacking, strict=True)
    return Shards(records, {url: each for url, each in stale.items() if each})


def _lacking(shard_id: str, cache: ScoreCache, spec: Spec | None) -> Stale | None:
    if not cache.has_entry(shard_id, None):
        return Stale("table", f"the score cache {cache.url} has no whole entry for it")
    if spec is not None and not cache.has_entry(shard_id, spec):
        return Stale("maps", f"the score cache {cache.url} has no maps of {spec.id} for it")
    return None
