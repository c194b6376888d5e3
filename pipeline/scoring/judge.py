"""Judge the images of shards on first use, for work that needs no scores.

Each shard is hashed, and judged unless the cache has a table of that hash. Any number of processes
may do so at once. `famt score` judges and scores on all machines of a cluster.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheFullError, UserError
from famt.pipeline.progress import progress_bar
from famt.pipeline.scoring.precompute import ShardReport, precompute_shard
from famt.pipeline.scoring.publish import score_and_publish
from famt.pipeline.sharding.shards import passed_over_line

_MOST_THREADS = 16  # each holds a tar


def judge_shards(urls: list[str], cache: ScoreCache, *, known_only: bool = False) -> dict[str, str]:
    """Record shards as they are now in the cache, with a progress bar.

    Args:
        urls: normalised.
        known_only: judge nothing; stop at the first shard that can't be read, or whose hash is not
            in the cache.

    Returns:
        reason by URL, for shards that could not be read or recorded, are no tars, or are not in the
        cache.

    Raises:
        CacheFullError: no room is left in the cache.
    """
    failed: dict[str, str] = {}
    reports: dict[str, ShardReport] = {}
    with (
        warnings.catch_warnings(),  # here, since threads would undo each other's
        _quiet_decoders(),
        progress_bar(total=len(urls), desc="checking shards", unit="shard") as bar,
    ):
        for url, outcome in score_and_publish(
            urls, lambda urls: _judge(urls, cache, known_only), cache, None
        ):
            bar.update()
            if isinstance(outcome, ShardReport):
                reports[url] = outcome
            else:
                failed[url] = outcome
                if known_only:
                    break
    for url, report in reports.items():
        if report.damage:
            print(f"damaged: {url}: {report.damage}", file=sys.stderr)
    if bad := sum(report.quarantined for report in reports.values()):
        kept = sum(report.kept for report in reports.values())
        print(
            f"{bad} of {bad + kept} images can't be used and are left out; "
            f"`famt cache ls --cache {cache.url} --bad` lists them",
            file=sys.stderr,
        )
    if line := passed_over_line(report.passed_over for report in reports.values()):
        print(line, file=sys.stderr)
    return failed


def _judge(
    urls: list[str], cache: ScoreCache, known_only: bool
) -> Iterator[tuple[str, ShardReport | str]]:
    """Each shard with its report, or why it has none, as threads finish them."""
    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS))
    try:
        running = {
            pool.submit(precompute_shard, url, cache, None, known_only=known_only): url
            for url in urls
        }
        for done in as_completed(running):
            try:
                outcome: ShardReport | str = done.result()
            except CacheFullError:
                raise
            except (UserError, RuntimeError, MemoryError, *storage.UNREACHABLE) as error:
                outcome = storage.reason(error)
            yield running[done], outcome
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Drop what libraries print to file descriptor 2, but not what Python prints to `sys.stderr`.

    libpng warns of odd files without their names, into the progress bar.
    """
    said, kept = sys.stderr, os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing, open(kept, "w", buffering=1) as stderr:
            if said is sys.__stderr__:
                sys.stderr = stderr
            os.dup2(nothing.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
    finally:
        sys.stderr = said
