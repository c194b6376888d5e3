"""Compute frequency scores of shards on Ray, into a cache that all experiments share.

    famt score --shards 'data/train-*.tar' --cache scores/
    ray job submit --working-dir . -- python jobs/precompute_freq.py \\
        --shards 's3://bucket/imagenet/train-{000000..001281}.tar' --cache s3://bucket/scores

Each task holds one tar in memory. Scores in the cache are found by the content of the tar, whatever
its name, and are not computed again: repeat the command after a crash or when the data set has
grown. Images that training cannot decode are quarantined with a reason and left out of training.
Other files are counted by extension. The last line is a summary: prose, or JSON with --json.

Of a tar that is cut off or broken, training uses the samples before the damage; every job on it
reports the damage. Quarantined images stay so until --retry-bad judges them again, for example with
newer decoders.

Exit code: 0 done; 1 a tar could not be scored or recorded, or there are more bad images or damaged
tars than --max-bad and --max-damaged allow, counting earlier jobs; 2 an error that ends the job at
once, such as a full disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import obstore.exceptions
import ray
import torch

from famt.jobs.cluster import failure, start_ray
from famt.jobs.options import PrecomputeFreq, seconds
from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.validity import look_up
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.progress import progress_bar
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import ShardReport, precompute_shard
from famt.pipeline.scoring.publish import score_and_publish
from famt.pipeline.sharding.patterns import expand_shards
from famt.pipeline.sharding.shards import passed_over_line
from famt.pipeline.storage import each_at_once
from famt.pipeline.wording import counted
from famt.train.command_line import parsed, run_program

# --watch goes on after these: no shards yet, an unreachable store, a lost head node.
_PASSING = (*storage.UNREACHABLE, CacheError, ray.exceptions.RayError)
_SHOWN = 10  # quarantined samples named on the terminal


@ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError, obstore.exceptions.GenericError])
def _score(url: str, cache: ScoreCache, spec: ScoreSpec, retry_bad: bool) -> ShardReport:
    torch.set_num_threads(1)
    return precompute_shard(url, cache, spec, retry_bad=retry_bad)


def main(args: PrecomputeFreq) -> int:
    """Run the job; see the module's docstring for the exit code."""
    while args.watch is not None:
        try:
            _run_once(args)
        except _PASSING as error:
            print(f"{type(error).__name__}: {storage.reason(error)}; trying again", file=sys.stderr)
        time.sleep(seconds(args.watch))
    return _run_once(args)


def _run_once(args: PrecomputeFreq) -> int:
    urls = expand_shards(args.shards)
    cache = _cache_apart(args.cache, urls)
    todo = urls if args.retry_bad else list(look_up(urls, cache, args.spec).stale)
    print(
        f"{counted(len(urls), 'shard')}, {len(urls) - len(todo)} scored before; "
        f"score {args.spec.id}, cache {cache.url}",
        flush=True,
    )
    if todo:
        start_ray()
    started = time.monotonic()
    reports: list[ShardReport] = []
    failed: dict[str, str] = {}
    with progress_bar(total=len(todo), desc="scoring", unit="shard", disable=not todo) as bar:
        bar.set_postfix_str("starting workers")
        for url, outcome in score_and_publish(
            todo,
            lambda urls: score_shards(urls, cache, args.spec, args.workers, args.retry_bad),
            cache,
            args.spec,
        ):
            if isinstance(outcome, ShardReport):
                reports.append(outcome)
            else:
                failed[url] = outcome
                bar.write(f"failed: {url}: {outcome}", file=sys.stderr)
            rate = sum(report.decoded for report in reports) / (time.monotonic() - started)
            bad = sum(report.quarantined for report in reports)
            bar.set_postfix_str(f"{rate:.0f} images/s, {bad} quarantined", refresh=False)
            bar.update()
    return _report(args, urls, reports, failed, cache, time.monotonic() - started)


def _cache_apart(url: str, shards: list[str]) -> ScoreCache:
    """The cache at `url`, created if missing.

    Raises:
        UserError: it lies in a folder of shards, or is not writable.
        OSError: it cannot be created.
    """
    root = storage.normalise_url(url)
    for folder in () if storage.is_remote(root) or not url else {Path(x).parent for x in shards}:
        if Path(root).is_relative_to(folder):
            raise UserError(
                f"--cache {root} lies in {folder}, a folder of shards; choose one outside"
            )
    cache = ScoreCache(url, create=True)
    if not storage.is_remote(root) and not os.access(root, os.W_OK | os.X_OK):
        raise UserError(
            f"--cache {root} is not writable; choose another, or change its permissions"
        )
    return cache


def score_shards(
    urls: list[str],
    cache: ScoreCache,
    spec: ScoreSpec,
    workers: int | None,
    retry_bad: bool = False,
) -> Iterator[tuple[str, ShardReport | str]]:
    """Score shards, `workers` at a time; yields each with its report or its error.

    Raises:
        CacheFullError: the disk of the cache is full.
    """
    waiting = iter(urls)
    running: dict[ray.ObjectRef, str] = {}
    while urls:
        # Ask each time: the cluster may grow and shrink.
        limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        while len(running) < limit and (url := next(waiting, None)) is not None:
            running[_score.remote(url, cache, spec, retry_bad)] = url
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        url = running.pop(done)
        try:
            yield url, ray.get(done)
        except ray.exceptions.RayTaskError as error:
            yield url, failure(error)
        except ray.exceptions.RayError as error:
            yield url, str(error)


def _report(
    args: PrecomputeFreq,
    urls: list[str],
    reports: list[ShardReport],
    failed: dict[str, str],
    cache: ScoreCache,
    seconds: float,
) -> int:
    records = cache.manifests.lookup([url for url in urls if url not in failed])
    ids = [record.shard_id for record in records.values()]
    tables = dict(zip(records, each_at_once(cache.read_table, ids), strict=True))
    damaged = {url: table.damage for url, table in tables.items() if table.damage}
    quarantined = [
        f"{url}:{bad.key}: {bad.reason}" for url, table in tables.items() for bad in table.rejected
    ]
    kept = sum(table.kept for table in tables.values())
    decoded = sum(report.decoded for report in reports)
    summary = {
        "shards": len(urls),
        "scored_now": len(reports),
        "failed": failed,
        "damaged": damaged,
        "kept": kept,
        "quarantined": len(quarantined),
        "decoded_now": decoded,
        "images_per_second": round(decoded / seconds, 1),
        "seconds": round(seconds, 1),
        "spec": {"id": args.spec.id, **args.spec.describe()},
        "cache": cache.url,
    }
    text = json.dumps(summary)
    if args.summary:
        Path(args.summary).write_text(text + "\n")
    done = f"scored {counted(decoded, 'image')} in {seconds:.0f} s"
    if not (reports or failed):
        done = "nothing to score"
    in_words = f"{done}; {kept} can be trained on"
    print(text if args.json else in_words)
    say = partial(print, file=sys.stderr)
    reasons = {"damaged": [": ".join(each) for each in damaged.items()], "quarantined": quarantined}
    for what, lines in reasons.items():
        for line in lines[:_SHOWN]:
            say(f"{what}: {line}")
        if len(lines) > _SHOWN:
            say(f"... and {len(lines) - _SHOWN} more {what}")
    if line := passed_over_line([table.passed_over for table in tables.values()]):
        say(line)
    too_bad = len(quarantined) > args.max_bad * (kept + len(quarantined))
    if too_bad:
        say(f"a larger share than --max-bad {args.max_bad} of the images is quarantined")
    too_damaged = len(damaged) > args.max_damaged
    if too_damaged:
        say(
            f"more than --max-damaged {args.max_damaged} of the tars are damaged; write them again "
            "to get the rest of their images"
        )
    return int(bool(failed or too_bad or too_damaged))


if __name__ == "__main__":
    run_program(main, parsed(PrecomputeFreq, __doc__))
