"""Score whole images with the encoder of a run: a new generation of maps for its training.

    famt refresh --follow runs/first        # beside a training, as long as it runs
    famt refresh --checkpoint runs/first    # once, from the latest checkpoint
    famt refresh --init exported --shards shards --cache scores
    ray job submit --working-dir . -- python jobs/refresh_scores.py --follow /shared/runs/weighed

Ray actors, on CPUs or on shares of GPUs, load the encoder once and write the maps of tar after tar
into the score cache, all kinds that the run asks for by one forward pass. When all tars are done
the generation is published, and the training takes it up with its next epoch. Run it again after a
crash: tars that are done are not done again. Beside a training that holds all of the cluster's CPUs
the job makes do with one actor of low priority.

With --follow, a generation that can't be made is tried again every minute while the run wants it.
`famt pretrain` starts this job beside its training, and ends it.

Exit code: 0 done; 1 a tar could not be scored, and no generation was published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from famt.jobs.cluster import start_ray
from famt.jobs.options import RefreshScores, RefreshWorkers
from famt.jobs.refresh_workers import UnwantedError, refresh_on_ray
from famt.models import ModelConfig
from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache
from famt.pipeline.collector import collect_superseded
from famt.pipeline.errors import UserError
from famt.pipeline.generations import Generation
from famt.pipeline.scores import ModelScoreSpec, check_model_kinds, encoder_digest
from famt.pipeline.table import load_samples
from famt.train.checkpoint import Encoder, load_encoder
from famt.train.initial import build_initial_encoder
from famt.train.program import is_users, parsed, run_program
from famt.train.signals.config import FrequencyConfig
from famt.train.signals.due import (
    due_encoders,
    failed_path,
    finished_path,
    followed,
    write_failure,
)

_POLL = 2.0  # seconds
_RETRY = 60.0  # seconds


def main(args: RefreshScores) -> int:
    """Make one generation, or every one that a run asks for; returns the exit code.

    Raises:
        ValueError: none or several of --checkpoint, --follow and --init; no such kind.
    """
    if [args.checkpoint, args.follow, args.init].count(None) != 2:
        raise UserError("give one of --checkpoint, --follow and --init")
    if args.follow is None:
        encoder = load_encoder(args.checkpoint) if args.checkpoint else initial_encoder(args)
        start_ray()
        return 1 if _refresh(encoder, args) else 0
    start_ray()
    left = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: left.set())
    return follow(args.follow, args, left)


def initial_encoder(args: RefreshScores) -> Encoder:
    """An encoder that is of no run, as a run of its own that has taken no step.

    Raises:
        ValueError: no shards or no cache, which no run names here.
    """
    assert args.init is not None
    if not args.shards or not args.cache:
        raise UserError("--init needs --shards and --cache: there is no run to take them from")
    encoder = build_initial_encoder(args.init, args.image_size)
    weights = encoder.state_dict()
    return Encoder(
        run=f"init-{encoder_digest(weights)[:12]}",
        step=0,
        sizes=dataclasses.asdict(ModelConfig.of(encoder)),
        weights=weights,
        config={"precision": "fp32"},
        kinds=[FrequencyConfig().kind],
    )


@contextmanager
def following(run: Path, workers: RefreshWorkers) -> Iterator[None]:
    """Follow a run in a process of its own, on the Ray cluster that this process is connected to.

    It ends with this context, and with this process, however that ends. What it says is added to
    <run>/refresh.log.
    """
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(workers).items()
        if value is not None
    ]
    environment = dict(os.environ)
    if ray.is_initialized():
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    with followed(run) as shown, open(run / "refresh.log", "ab") as log:
        job = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", __name__, "--follow", str(run),
             *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            pass_fds=[shown],
            start_new_session=True,  # a Ctrl-C is for the training alone
        )  # fmt: skip
    try:
        yield
    finally:
        job.terminate()
        job.wait()


def follow(run: Path, args: RefreshScores, left: threading.Event | None = None) -> int:
    """Make a generation of every encoder that a run leaves, the newest first, until it is finished.

    Args:
        left: ends this as well.

    Returns:
        1 if the last one could not be made.
    """
    if not run.is_dir():
        print(f"{run} is not there yet; waiting for a run to begin in it", file=sys.stderr)
    with followed(run):
        return _follow(run, args, left)


def _follow(run: Path, args: RefreshScores, left: threading.Event | None) -> int:
    def over() -> bool:
        return finished_path(run).exists() or (left is not None and left.is_set())

    done: set[tuple[Path, int]] = set()  # with the time: a run begun anew writes the same names
    retry_at, failure = 0.0, None
    with tqdm(desc=f"following {run}", unit=" generations") as bar:
        while not over():
            newest = _newest(run)
            if newest is None or newest in done or (failure and time.monotonic() < retry_at):
                time.sleep(_POLL)
                continue
            path, _ = newest
            failure = _try(path, args, over)
            if failure:
                retry_at = time.monotonic() + _RETRY
                with contextlib.suppress(OSError):
                    write_failure(path, failure)
                tqdm.write(f"{path}: {failure}", file=sys.stderr)
            else:
                failed_path(path).unlink(missing_ok=True)
                done.add(newest)
                bar.update()
    return 1 if failure else 0


def _newest(run: Path) -> tuple[Path, int] | None:
    """The newest encoder that a run has left, and the time of its writing."""
    try:
        return max(((each, each.stat().st_mtime_ns) for each in due_encoders(run)), default=None)
    except FileNotFoundError:  # taken up just now
        return None


def _try(path: Path, args: RefreshScores, over: Callable[[], bool]) -> str | None:
    """Make the generation of an encoder; returns why it could not be made."""
    try:
        failed = _refresh(load_encoder(path), args, over)
        return "; ".join(f"{tar}: {reason}" for tar, reason in failed.items()) or None
    except UnwantedError:
        return None
    except Exception as error:  # whatever it is, the run may wait for the maps or for the reason
        if isinstance(error, FileNotFoundError) and not path.exists():
            return None  # taken up meanwhile, and removed
        if not is_users(error):
            traceback.print_exc()
        return storage.reason(error)


def _refresh(
    encoder: Encoder, args: RefreshScores, over: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Make one generation, unless it is `over`; returns which tars could not be scored, and why."""
    run: dict[str, Any] = encoder.config
    sizes = ModelConfig(**encoder.sizes)
    cache = ScoreCache(args.cache or run["cache"])
    # Just the run's own tars, in its order: others may have come into its folders meanwhile.
    urls = encoder.urls
    if args.shards or urls is None:
        urls = storage.expand(args.shards or run["shards"])
    digest = encoder_digest(encoder.weights)
    specs = [
        ModelScoreSpec(
            kind=kind,
            grid=sizes.grid,
            image_size=sizes.image_size,
            encoder=digest,
            precision=args.precision or run["precision"],
        )
        for kind in args.kinds or encoder.kinds
    ]
    if not specs:
        raise UserError(f"run {encoder.run} weighs by no refreshed score; say which by --kinds")
    check_model_kinds(spec.kind for spec in specs)
    samples = load_samples(urls, cache)
    started = time.perf_counter()
    with cache.claims.claimed(spec.id for spec in specs):  # what is there already must stay
        failed = _score_all(urls, encoder, cache, specs, args, over)
        lost = set() if failed else set(cache.lacking(samples.shard_ids, specs))
        failed |= {
            url: "its maps were deleted while others were made; try again"
            for url, shard_id in zip(samples.urls, samples.shard_ids, strict=True)
            if shard_id in lost
        }
        if not failed:
            cache.generations.publish(
                Generation(encoder.run, encoder.step, specs, samples.digest, len(samples))
            )
            collect_superseded(cache, encoder.run, samples.shard_ids)
    seconds = time.perf_counter() - started
    summary = {
        "run": encoder.run,
        "step": encoder.step,
        "pin": f"{encoder.run}/{encoder.step}",
        "specs": [spec.id for spec in specs],
        "shards": len(urls),
        "images": len(samples),
        "failed": failed,
        "images_per_second": round(len(samples) / seconds, 1),
        "seconds": round(seconds, 1),
        "cache": cache.url,
    }
    print(json.dumps(summary), flush=True)
    return failed


def _score_all(
    urls: list[str],
    encoder: Encoder,
    cache: ScoreCache,
    specs: list[ModelScoreSpec],
    args: RefreshScores,
    over: Callable[[], bool],
) -> dict[str, str]:
    """Make the cache hold the maps of some tars; returns what failed, with the reason."""
    failed = {}
    names = ", ".join(spec.kind for spec in specs)
    with tqdm(total=len(urls), desc=f"step {encoder.step}: {names}", unit="shard") as bar:
        bar.set_postfix_str("starting workers")
        for tars, outcome in refresh_on_ray(urls, encoder, cache, specs, args, over):
            if isinstance(outcome, str):
                failed[tars[0]] = outcome
                tqdm.write(f"{tars[0]} to {tars[-1]}: {outcome}", file=sys.stderr)
            bar.set_postfix_str("", refresh=False)
            bar.update(len(tars))
    return failed


if __name__ == "__main__":
    run_program(main, parsed(RefreshScores, __doc__))
