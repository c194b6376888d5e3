"""Judge the images of shards on first use, for work that needs no scores.

Each shard is hashed, and judged unless the cache has a table of that hash. Any number of processes
may do so at once. `famt score` judges and scores on all machines of a cluster.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

from tqdm import tqdm

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheFullError, UserError
from famt.pipeline.scoring.precompute import ShardReport, precompute_shard
from famt.pipeline.scoring.publish import Publisher
from famt.pipeline.sharding.shards import passed_over_line

_MOST_THREADS = 16  # each holds a tar


def judge_shards(
    urls: Sequence[str], cache: ScoreCache, *, known_only: bool = False
) -> dict[str, str]:
    """Record shards as they are now in the cache, with a progress bar.

    Args:
        urls: normalised.
        known_only: judge nothing; stop at the first shard that can't be read, or whose hash is not
            in the cache.

    Returns:
        reason by URL, for shards that could not be read, are no tars, or are not in the cache.

    Raises:
        OSError: the cache can't be written.
        CacheFullError: no room is left in the cache.
    """
    failed: dict[str, str] = {}
    reports: dict[str, ShardReport] = {}
    with tqdm(total=len(urls), desc="judging shards", unit="shard", mininterval=1) as bar:
        while urls:
            urls = _judge(urls, cache, known_only, bar, reports, failed)
    for url, report in reports.items():
        if report.damage:
            print(f"damaged: {url}: {report.damage}", file=sys.stderr)
    bad = sum(report.quarantined for report in reports.values())
    if bad:
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
    urls: Sequence[str],
    cache: ScoreCache,
    known_only: bool,
    bar: tqdm,
    reports: dict[str, ShardReport],
    failed: dict[str, str],
) -> list[str]:
    """Judge shards and publish them; returns those to judge again, see `publish`."""
    publisher = Publisher(cache, None)
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with (
        warnings.catch_warnings(),  # here, since threads would undo each other's
        _quiet_decoders(),
        ThreadPoolExecutor(threads) as pool,
    ):
        running = {
            pool.submit(precompute_shard, url, cache, None, known_only=known_only): url
            for url in urls
        }
        for done in as_completed(running):
            url = running[done]
            try:
                report = done.result()
            except CancelledError:
                continue
            except CacheFullError:
                _cancel(running)
                raise
            except (UserError, RuntimeError, MemoryError, *storage.UNREACHABLE) as error:
                failed[url] = storage.reason(error)
                if known_only:
                    _cancel(running)
            else:
                reports[url] = report
                publisher.add(report)
            bar.update()
    if problem := publisher.flush():
        raise OSError(problem)
    return publisher.lost


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


def _cancel(running: Iterable[Future]) -> None:
    """Let running work end, and start no more."""
    for each in running:
        each.cancel()
