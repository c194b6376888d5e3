"""Record scored shards in the cache's manifests, so that later runs know them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import ShardReport
from famt.pipeline.storage import each_at_once

_INTERVAL = 10.0  # seconds; a killed process loses at most the records of this long


def publish(reports: Sequence[ShardReport], cache: ScoreCache, spec: ScoreSpec | None) -> list[str]:
    """Record shards whose table, and whose maps of `spec`, are in the cache.

    Returns:
        URLs of shards whose entry a collection (`famt cache gc`) deleted before it was recorded:
        score these again.
    """
    cache.manifests.publish(
        {each.url: ShardRecord(each.version, each.shard_id) for each in reports}
    )

    def lost(report: ShardReport) -> bool:
        return not (cache.has(report.shard_id) and cache.has(report.shard_id, spec))

    return [each.url for each in compress(reports, each_at_once(lost, reports))]


def score_and_publish(
    urls: list[str],
    score: Callable[[list[str]], Iterable[tuple[str, ShardReport | str]]],
    cache: ScoreCache,
    spec: ScoreSpec | None,
) -> Iterator[tuple[str, ShardReport | str]]:
    """Score shards and record them every ten seconds, as they are done.

    Args:
        score: yields the URL of each shard with its report, or with the reason why it has none.

    Yields:
        the same, and at the end the reason for each shard that was scored but not recorded.

    Raises:
        CacheFullError: no room is left in the cache.
    """
    waiting: list[ShardReport] = []
    lost: list[str] = []

    def flush() -> str:
        """Record all that waits; returns "", or why it still waits."""
        try:
            lost.extend(publish(waiting, cache, spec))
        except storage.UNREACHABLE as error:
            reason = storage.reason(error)
            return (
                f"scored, but not in the manifest: {reason}; run it again, nothing is scored twice"
            )
        waiting.clear()
        return ""

    problem, published = "", time.monotonic()
    while urls:
        for url, outcome in score(urls):
            if isinstance(outcome, ShardReport):
                waiting.append(outcome)
            if time.monotonic() - published > _INTERVAL:
                flush()
                published = time.monotonic()
            yield url, outcome
        problem = flush()
        urls, lost = lost, []
    for report in waiting:
        yield report.url, problem
