"""Score whole images with the encoder of a run: a new generation of maps for its training.

    python jobs/refresh_scores.py --follow runs/first        # beside `--attention periodic`
    python jobs/refresh_scores.py --checkpoint runs/first    # once, from the latest checkpoint
    ray job submit --working-dir . -- python jobs/refresh_scores.py --follow /shared/runs/first

Ray actors, on CPUs or on shares of GPUs, load the encoder once and write the maps of tar after tar
into the score cache. When all tars are done the generation is published, and the training takes it
up with its next epoch. Run it again after a crash: tars that are done are not done again.

Exit code: 0 done; 1 a tar could not be scored, and no generation was published.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import obstore.exceptions
import ray
import torch
import tyro
from tqdm import tqdm

from famt.models import ModelConfig
from pipeline import storage
from pipeline.cache import ScoreCache
from pipeline.collector import collect_superseded
from pipeline.generations import Generation
from pipeline.refresh import refresh_shards
from pipeline.scores import ModelScoreSpec, encoder_digest
from pipeline.table import load_samples
from train.checkpoint import Encoder, load_encoder
from train.program import run_program
from train.refresh import finished_path

_POLL = 2.0  # seconds
_SHARDS_A_TASK = 16  # a task builds one DALI graph; what a lost worker did not finish is done again


@dataclass(frozen=True)
class RefreshScores:
    """Which encoder to score with, and on what."""

    checkpoint: Path | None = None
    """checkpoint, folder of a run (its latest one), or an encoder that a run left for refresh"""
    follow: Path | None = None
    """folder of a run: score with every encoder that it leaves for refresh, until it is finished"""
    shards: list[str] | None = None
    """tars to score; those of the run if left out"""
    cache: str | None = None
    """score cache; that of the run if left out"""
    kind: str | None = None
    """famt (token frequency x attention, the paper's weight), attention, cls_attention,
    token_frequency, or a kind that an installed package adds; what the run weighs by if left out"""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 computes under autocast"""
    workers: int | None = None
    """actors; as many as the cluster has room for if left out"""
    cpus_per_worker: int = 1
    """CPU cores, and decoding threads, of each"""
    gpus_per_worker: float = 0.0
    """share of a GPU for each, 0.25 say; 0 computes on the CPU"""
    batch_size: int = 32
    """images at a time"""


@ray.remote(max_restarts=-1, max_task_retries=3)
class _Refresher:
    def __init__(
        self, encoder: Encoder, cache: ScoreCache, spec: ModelScoreSpec, threads: int, gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if gpu else "cpu")
        self._encoder = encoder.build().to(self._device)
        self._cache, self._spec, self._threads = cache, spec, threads

    @ray.method(retry_exceptions=[OSError, obstore.exceptions.GenericError])
    def refresh(self, urls: list[str], batch_size: int) -> int:
        """Put the maps of some tars into the cache; returns how many tars."""
        done = refresh_shards(
            self._encoder,
            urls,
            self._cache,
            self._spec,
            batch_size=batch_size,
            threads=self._threads,
            device=self._device,
        )
        return sum(1 for _ in done)


def main(args: RefreshScores) -> int:
    """Make one generation, or every one that a run asks for; returns the exit code.

    Raises:
        ValueError: neither or both of --checkpoint and --follow; no such kind.
    """
    if (args.checkpoint is None) == (args.follow is None):
        raise ValueError("give either --checkpoint or --follow")
    if args.checkpoint is not None:
        encoder = load_encoder(args.checkpoint)
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        return _refresh(encoder, args)
    assert args.follow is not None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    for path in _marked(args.follow):
        try:
            encoder = load_encoder(path)
        except FileNotFoundError:  # taken up meanwhile, and removed
            continue
        code = _refresh(encoder, args)
        if code:
            return code
    return 0


def _marked(run: Path) -> Iterator[Path]:
    """Encoders that a run leaves for refresh, the newest first, until it is finished."""
    done: set[tuple[Path, int]] = set()  # with the time: a run begun anew writes the same names
    if not run.is_dir():
        print(f"{run} is not there yet; waiting for a run to begin in it", file=sys.stderr)
    with tqdm(desc=f"following {run}", unit=" generations") as bar:
        while not finished_path(run).exists():
            found = sorted((run / "refresh").glob("encoder-*.pt"))
            try:
                marked = {(path, path.stat().st_mtime_ns) for path in found}
            except FileNotFoundError:  # taken up just now
                continue
            if found and max(marked) not in done:
                yield found[-1]
                done |= marked
                bar.update()
            else:
                time.sleep(_POLL)


def _refresh(encoder: Encoder, args: RefreshScores) -> int:
    run: dict[str, Any] = encoder.config
    sizes = ModelConfig(**encoder.sizes)
    cache = ScoreCache(args.cache or run["cache"])
    urls = storage.expand(args.shards or run["shards"])
    spec = ModelScoreSpec(
        kind=args.kind or run["periodic"]["kind"],
        grid=sizes.grid,
        image_size=sizes.image_size,
        encoder=encoder_digest(encoder.weights),
        precision=args.precision,
    )
    table = load_samples(urls, cache)
    started = time.perf_counter()
    claim = cache.claims.claim(specs=[spec.id])  # maps that are there already must stay
    failed = _score_all(urls, encoder, cache, spec, args)
    if not failed:
        cache.generations.publish(
            Generation(encoder.run, encoder.step, spec, table.digest, len(table))
        )
        collect_superseded(cache, encoder.run, table.shard_ids)
    cache.claims.release([claim])
    seconds = time.perf_counter() - started
    summary = {
        "run": encoder.run,
        "step": encoder.step,
        "spec": spec.id,
        "shards": len(urls),
        "images": len(table),
        "failed": failed,
        "images_per_second": round(len(table) / seconds, 1),
        "seconds": round(seconds, 1),
        "cache": cache.url,
    }
    print(json.dumps(summary), flush=True)
    return 1 if failed else 0


def _score_all(
    urls: list[str],
    encoder: Encoder,
    cache: ScoreCache,
    spec: ModelScoreSpec,
    args: RefreshScores,
) -> dict[str, str]:
    """Make the cache hold the maps of some tars; returns what failed, with the reason."""
    failed = {}
    with tqdm(total=len(urls), desc=f"step {encoder.step}: {spec.id}", unit="shard") as bar:
        for tars, outcome in _run_all(urls, encoder, cache, spec, args):
            if isinstance(outcome, str):
                failed[tars[0]] = outcome
                tqdm.write(f"{tars[0]} to {tars[-1]}: {outcome}", file=sys.stderr)
            bar.update(len(tars))
    return failed


def _run_all(
    urls: list[str],
    encoder: Encoder,
    cache: ScoreCache,
    spec: ModelScoreSpec,
    args: RefreshScores,
) -> Iterator[tuple[list[str], int | str]]:
    """Tars and how many were done, or why they were not, as the actors finish them."""
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1) // args.cpus_per_worker)
    if args.gpus_per_worker:
        room = min(room, int(resources.get("GPU", 0) / args.gpus_per_worker))
    if room < 1:
        raise ValueError(
            f"the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} "
            "GPUs: no room for one worker; lower --cpus-per-worker or --gpus-per-worker"
        )
    workers = min(args.workers or room, len(urls))
    size = max(1, min(_SHARDS_A_TASK, len(urls) // (4 * workers)))
    parts = [urls[first : first + size] for first in range(0, len(urls), size)]
    state = ray.put(encoder)
    actors = [
        _Refresher.options(  # type: ignore[attr-defined]
            num_cpus=args.cpus_per_worker, num_gpus=args.gpus_per_worker
        ).remote(state, cache, spec, args.cpus_per_worker, args.gpus_per_worker > 0)
        for _ in range(workers)
    ]
    waiting = iter(parts)
    running: dict[ray.ObjectRef, tuple[Any, list[str]]] = {}
    idle = list(actors)
    while True:
        while idle and (part := next(waiting, None)) is not None:
            actor = idle.pop()
            running[actor.refresh.remote(part, args.batch_size)] = (actor, part)
        if not running:
            return
        (done,), _ = ray.wait(list(running), num_returns=1)
        actor, part = running.pop(done)
        idle.append(actor)
        try:
            yield part, ray.get(done)
        except ray.exceptions.RayTaskError as error:
            yield part, f"{type(error.cause).__name__}: {error.cause}"
        except ray.exceptions.RayError as error:
            yield part, str(error)


if __name__ == "__main__":
    run_program(main, tyro.cli(RefreshScores, description=__doc__))
