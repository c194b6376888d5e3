"""Record scored shards in the cache's manifests, so that later runs know them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import compress

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import ShardReport
from famt.pipeline.storage import each_at_once

_INTERVAL = 10.0  # seconds; a killed process loses at most the records of this long


def publish(reports: Iterable[ShardReport], cache: ScoreCache, spec: ScoreSpec | None) -> list[str]:
    """Record shards whose table, and whose maps of `spec`, are in the cache.

    Returns:
        URLs of shards whose entry a collection (`famt cache gc`) deleted before it was recorded:
        score these again.
    """
    reports = list(reports)
    cache.manifests.publish(
        {each.url: ShardRecord(each.version, each.shard_id) for each in reports}
    )

    def lost(report: ShardReport) -> bool:
        return not (cache.has(report.shard_id) and cache.has(report.shard_id, spec))

    return [each.url for each in compress(reports, each_at_once(lost, reports))]


class Publisher:
    """Publishes reports every ten seconds, as they come in.

    Attributes:
        waiting: reports not published yet.
        lost: URLs of shards to score again; see `publish`.
    """

    def __init__(self, cache: ScoreCache, spec: ScoreSpec | None) -> None:
        self._cache, self._spec = cache, spec
        self._published = time.monotonic()
        self.waiting: list[ShardReport] = []
        self.lost: list[str] = []

    def add(self, report: ShardReport) -> None:
        """Publish a report within the next ten seconds, or at `flush`.

        Raises:
            CacheFullError: no room is left in the cache.
        """
        self.waiting.append(report)
        if time.monotonic() - self._published > _INTERVAL:
            self.flush()
            self._published = time.monotonic()

    def flush(self) -> str:
        """Publish all reports now; returns "", or why they still wait.

        Raises:
            CacheFullError: no room is left in the cache.
        """
        try:
            self.lost += publish(self.waiting, self._cache, self._spec)
        except storage.UNREACHABLE as error:
            reason = storage.reason(error)
            return (
                f"scored, but not in the manifest: {reason}; run it again, nothing is scored twice"
            )
        self.waiting.clear()
        return ""
