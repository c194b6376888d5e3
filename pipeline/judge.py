"""Judge the images of shards on first use, for work that needs images and no scores.

Each shard is hashed, and its images are judged unless the cache knows the hash. The tables go into
the cache. Any number of processes may do the same work at once; on a cluster `famt score` does it,
and scores, on all machines.
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
from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import CacheFullError
from famt.pipeline.precompute import ShardReport, precompute_shard
from famt.pipeline.publish import Publisher
from famt.pipeline.shards import passed_over_line

_MOST_THREADS = 16  # each holds a tar


def judge_shards(
    urls: Sequence[str], cache: ScoreCache, *, known_only: bool = False
) -> dict[str, str]:
    """Make the cache know shards as they are now, with a progress bar.

    Args:
        urls: normalised.
        known_only: judge nothing; the first shard whose hash the cache does not know, or that can't
            be read, ends the work, and the others stay unknown.

    Returns:
        shards (URL -> reason) that could not be read, are no tars, or stay unknown.

    Raises:
        OSError: the cache can't be written.
        CacheFullError: no room is left in it.
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
        warnings.catch_warnings(),  # threads that do so themselves would undo each other's
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
            except (ValueError, RuntimeError, MemoryError, *storage.UNREACHABLE) as error:
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
    """Drop what libraries print to file 2, and nothing that Python prints to `sys.stderr`.

    libpng tells of odd files there, without their names, into the progress bar; what counts of it
    is the verdict on the image.
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
    """Let what has begun come to its end, and nothing else begin."""
    for each in running:
        each.cancel()
