"""Refresh score maps: score all images with the encoder of a run in training.

    famt refresh --follow runs/first                     # beside a run, until it is finished
    famt refresh --checkpoint runs/first --out maps      # once, with the latest checkpoint
    famt refresh --init exported --shards shards --cache scores --out maps
    ray job submit --working-dir . -- python jobs/refresh_scores.py --follow /shared/runs/weighed

Ray actors, on CPUs or shares of GPUs, load the encoder once and score tar after tar, all kinds of
scores in one forward pass. When all tars are done, the job writes a generation of maps: one file in
<run>/refresh or in --out. The run uses it from its next epoch on; other runs may pin it. On a
cluster without free CPUs, one low-priority actor does the work.

With --follow, a failed generation is tried again every minute while the run needs it. `famt
pretrain` starts and stops this job by itself.

Exit code: 0 done; 1 a tar could not be scored, and no generation was written.
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

import numpy as np
import ray
from tqdm import tqdm

from famt.jobs.cluster import start_ray
from famt.jobs.options import RefreshScores, RefreshWorkers
from famt.jobs.refresh_workers import Maps, UnwantedError, refresh_on_ray
from famt.models import ModelConfig
from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable, load_samples
from famt.pipeline.progress import progress_bar
from famt.pipeline.scores import ModelScoreSpec, check_model_kinds, encoder_digest
from famt.pipeline.scoring.generation import generation_path, write_generation
from famt.pipeline.sharding.patterns import expand_shards
from famt.pipeline.wording import counted
from famt.train.command_line import is_users, parsed, run_program
from famt.train.initial import build_initial_encoder
from famt.train.run_folder import written_whole
from famt.train.signals.config import FrequencyConfig
from famt.train.signals.refresh_folder import Encoder, RefreshFolder, load_encoder

_POLL = 2.0  # seconds
_RETRY = 60.0  # seconds


def main(args: RefreshScores) -> int:
    """Make one generation, or all that a run needs; returns the exit code.

    Raises:
        UserError: not exactly one of --checkpoint, --follow and --init; an unknown kind.
    """
    if [args.checkpoint, args.follow, args.init].count(None) != 2:
        raise UserError("give one of --checkpoint, --follow and --init")
    if (args.out is None) != (args.follow is not None):
        raise UserError(
            "--checkpoint and --init need --out, a folder for the maps; --follow writes into the "
            "run's folder"
        )
    if args.out is not None:
        encoder = load_encoder(args.checkpoint) if args.checkpoint else initial_encoder(args)
        path = generation_path(args.out, encoder.step)
        if path.exists():
            raise UserError(f"{path} exists already; give another --out, or remove it")
        start_ray()
        return 1 if _refresh(encoder, path, args) else 0
    assert args.follow is not None
    start_ray()
    left = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: left.set())
    return follow(args.follow, args, left)


def initial_encoder(args: RefreshScores) -> Encoder:
    """The encoder of --init, as that of a run at step 0.

    Raises:
        UserError: --shards or --cache is missing.
    """
    assert args.init is not None
    if not args.shards or not args.cache:
        raise UserError("--init needs --shards and --cache")
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
    """Follow a run in a separate process, on the Ray cluster of this process if it has joined one.

    At the end of this context, or of this process, however that ends, the process is asked to end
    too; it shuts down its Ray first, for up to a minute. Its output goes to <run>/refresh.log.
    """
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(workers).items()
        if value is not None
    ]
    environment = dict(os.environ)
    if ray.is_initialized():
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    with RefreshFolder(run).followed() as shown, open(run / "refresh.log", "ab") as log:
        job = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", __name__, "--follow", str(run),
             *options],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            pass_fds=[shown],
            start_new_session=True,  # Ctrl-C is for the training
        )  # fmt: skip
    try:
        yield
    finally:
        job.terminate()  # without waiting: nobody needs what it is making


def follow(run: Path, args: RefreshScores, left: threading.Event | None = None) -> int:
    """Make a generation for each encoder that a run leaves, newest first, until it is finished.

    Args:
        left: an event that ends this too.

    Returns:
        1 if the last generation failed, else 0.
    """
    if not run.is_dir():
        print(f"{run} does not exist yet; waiting for a run to start in it", file=sys.stderr)
    folder = RefreshFolder(run)

    def over() -> bool:
        return folder.finished.exists() or (left is not None and left.is_set())

    retry_at, failure = 0.0, None
    shown = "{desc}: {n_fmt} [{elapsed}]"
    with (
        folder.followed(),
        progress_bar(desc=f"generations made for {run}", bar_format=shown) as bar,
    ):
        while not over():
            step = folder.due()
            if step is None or (failure and time.monotonic() < retry_at):
                time.sleep(_POLL)
                continue
            failure = _try(folder, step, args, over)
            if failure:
                retry_at = time.monotonic() + _RETRY
                with contextlib.suppress(OSError), written_whole(folder.failure(step)) as file:
                    file.write(f"{failure}\n".encode())
                tqdm.write(f"step {step}: {failure}", file=sys.stderr)
            else:
                folder.failure(step).unlink(missing_ok=True)
                bar.update(folder.generation(step).exists())  # it may not have been wanted any more
    return 1 if failure else 0


def _try(
    folder: RefreshFolder, step: int, args: RefreshScores, over: Callable[[], bool]
) -> str | None:
    """Make the generation of a run's encoder; returns the error, or None."""
    path = folder.encoder(step)
    written = _written(path)
    try:
        failed = _refresh(
            load_encoder(path),
            folder.generation(step),
            args,
            lambda: over() or _written(path) != written,  # in use already, or another run's
        )
        return "; ".join(f"{tar}: {reason}" for tar, reason in failed.items()) or None
    except UnwantedError:
        return None
    except Exception as error:  # the run may wait for maps, or for the reason
        if _written(path) != written:
            return None
        if not is_users(error):
            traceback.print_exc()
        return storage.reason(error)


def _written(path: Path) -> int | None:
    """Modification time of a file, ns; None if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _refresh(
    encoder: Encoder, path: Path, args: RefreshScores, over: Callable[[], bool] = lambda: False
) -> dict[str, str]:
    """Make a generation; returns tars that could not be scored, with reasons."""
    run: dict[str, Any] = encoder.config
    sizes = ModelConfig(**encoder.sizes)
    cache = ScoreCache(args.cache or run["cache"])
    # The run's own tars in its order, without tars that came later.
    urls = encoder.urls
    if args.shards or urls is None:
        urls = expand_shards(args.shards or run["shards"])
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
        raise UserError(f"run {encoder.run} uses no refreshed score; choose with --kinds")
    check_model_kinds(spec.kind for spec in specs)
    samples = load_samples(urls, cache)
    started = time.perf_counter()
    shape = (len(samples), sizes.grid, sizes.grid)
    maps = {spec: np.empty(shape, np.float16) for spec in specs}
    failed = _score_all(samples, encoder, cache, maps, args, over)
    if over():
        raise UnwantedError
    if not failed:
        write_generation(path, encoder.run, samples.digest, maps)
    summary: dict[str, Any] = {
        "run": encoder.run,
        "step": encoder.step,
        "generation": str(path),
        "kinds": [spec.kind for spec in specs],
        "images": len(samples),
        "failed": failed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    end = f"written to {path}"
    if failed:
        end = f"{counted(len(failed), 'tar')} failed, nothing is written"
    in_words = (
        f"step {encoder.step} of {encoder.run}: {' and '.join(summary['kinds'])} of "
        f"{counted(len(samples), 'image')} in {summary['seconds']:.0f} s; {end}"
    )
    print(json.dumps(summary) if args.json else in_words, flush=True)
    return failed


def _score_all(
    samples: SampleTable,
    encoder: Encoder,
    cache: ScoreCache,
    maps: Maps,
    args: RefreshScores,
    over: Callable[[], bool],
) -> dict[str, str]:
    """Fill in the maps of all images; returns tars that failed, with reasons."""
    failed, urls = {}, samples.urls
    names = ", ".join(spec.kind for spec in maps)
    with progress_bar(total=len(urls), desc=f"step {encoder.step}: {names}", unit="shard") as bar:
        bar.set_postfix_str("starting workers")
        for part, outcome in refresh_on_ray(samples, encoder, cache, [*maps], args, over):
            if isinstance(outcome, str):
                failed[urls[part.start]] = outcome
                tqdm.write(f"{urls[part.start]} to {urls[part.stop - 1]}: {outcome}", sys.stderr)
            else:
                rows = slice(samples.first_row[part.start], samples.first_row[part.stop])
                for spec, scored in outcome.items():
                    maps[spec][rows] = scored
            bar.set_postfix_str("", refresh=False)
            bar.update(len(part))
    return failed


if __name__ == "__main__":
    run_program(main, parsed(RefreshScores, __doc__))
