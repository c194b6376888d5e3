"""Try on one GPU what only a GPU can show: a page of results, and exit code 0 if all is well.

    make gpu
    famt gpu-check --out gpu.md --minutes 10

    tests       those that need a GPU
    parity      crops of the GPU's loader, image by image, beside the CPU's, while training runs
    waits       50 steps of training under torch.cuda.set_sync_debug_mode("warn"): what made the
                host wait for the GPU
    runs        crops/s of whole trainings, loader included, with peak memory
    compiled    the same with --compile
    step, loader, refresh, attention
                the benchmarks of these names, on the GPU and in bf16

The most telling parts come first. The page is written after each part; none begins once
`--minutes` are over. Where there is no GPU each part is skipped with the reason. `--device cpu`
runs all code on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from famt.jobs.benchmark import Benchmark
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.refresh import Refresh
from famt.jobs.benchmarks.runs import Runs
from famt.jobs.benchmarks.step import Attention, Step
from famt.jobs.benchmarks.training import BenchmarkOptions, open_run, take_steps
from famt.models import MODELS
from famt.pipeline.loader import CropLoader
from famt.pipeline.options import Checked
from famt.train.pretrain import Run
from famt.train.program import parsed, run_program

_SYNC = "called a synchronizing CUDA operation"
_CLOSE = 0.5  # of 255, mean over an image: another decoder and another resampling kernel
_MARK = "mark." + "gpu"


@dataclass(frozen=True)
class GpuCheck(Checked):
    """What to try, and how much of it."""

    out: Path = Path("gpu.md")
    """file for the page of results"""
    device: Literal["cuda", "cpu"] = "cuda"
    """what to try"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    minutes: Annotated[float, Gt(0)] = 4.0
    """no part begins after so many; the first of a machine takes a minute to start"""
    shards: list[str] = field(default_factory=list)
    """tars of photos to train on; a shard is made up if left out"""
    batch_size: Annotated[int, Ge(2)] = 256
    """images a step"""
    photos: Annotated[int, Ge(2)] = 1024
    """photos of the made-up shard"""
    steps: Annotated[int, Ge(1)] = 50
    """of a training that is timed or watched"""
    parity_batches: Annotated[int, Ge(1)] = 20
    """batches that are compared with the CPU's"""
    rounds: Annotated[int, Ge(1)] = 5
    """of each benchmark"""
    tests: bool = True
    """run the tests that need a GPU"""


def main(check: GpuCheck) -> int:
    """Try part after part; returns 1 if one failed, 0 if all passed or were skipped."""
    on_gpu = check.device == "cuda" and torch.cuda.is_available()
    missing = None if on_gpu or check.device == "cpu" else "no GPU that torch can use"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}"
    built = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    page = [f"# {name}", "", f"{built}, {check}", ""]
    failed, began = False, time.monotonic()
    with contextlib.ExitStack() as opened:
        urls = [] if missing else opened.enter_context(measure.shards(check.shards, check.photos))
        for part, lines in _parts(check, urls).items():
            started = time.monotonic()
            late = started - began > 60 * check.minutes
            skipped = missing or (f"{check.minutes:g} minutes are over" if late else None)
            verdict = f"skipped: {skipped}" if skipped else "passed"
            page += [f"## {part}", ""]
            try:
                page += [] if skipped else (f"    {line}" for line in lines)
            except (AssertionError, OSError, RuntimeError, ValueError) as error:
                failed, verdict = True, f"FAILED: {type(error).__name__}: {error}"
            page += ["", f"{verdict}, {time.monotonic() - started:.0f} s", ""]
            print(f"{part}: {verdict}", flush=True)
            check.out.write_text("\n".join(page))
    print(f"results are in {check.out}")
    return int(failed)


def _parts(check: GpuCheck, urls: list[str]) -> dict[str, Iterator[str]]:
    """Lines of the page by the name of a part; a part is tried as its lines are read."""
    options: dict[str, Any] = {
        "shards": urls, "model": check.model, "batch_size": check.batch_size,
        "precision": "bf16", "device": check.device,
    }  # fmt: skip
    count = check.rounds
    benchmarks: dict[str, Benchmark] = {
        "runs": Runs(steps=check.steps, **options),
        "compiled": Runs(steps=check.steps, options="--compile", **options),
        "step": Step(rounds=count, **options),
        "loader": Loader(
            urls,
            rounds=count,
            batch_size=check.batch_size,
            images=4 * check.photos,
            device=check.device,
        ),
        "refresh": Refresh(rounds=count, scored_at_once=check.batch_size, **options),
        "attention": Attention(rounds=count, **options),
    }
    return {
        "tests": _tests(check),
        "parity": _parity(check, urls),
        "waits": _waits(check, urls),
        **{name: map(json.dumps, each.run()) for name, each in benchmarks.items()},
    }


def _tests(check: GpuCheck) -> Iterator[str]:
    if not check.tests:
        yield "not asked for"
        return
    tests = Path(__file__).parents[1] / "tests"
    # The others may need packages that a GPU machine lacks.
    files = [str(each) for each in sorted(tests.rglob("test_*.py")) if _MARK in each.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent, check=False)
    yield from done.stdout.splitlines()[-20:]
    if done.returncode:
        raise RuntimeError(f"the tests under gpu end with {done.returncode}")


def _parity(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    with _run(check, urls) as run:
        reference = CropLoader(run.samples, run.loader.config, drop_last=True, seed=run.config.seed)
        compared, worst, total = 0, 0.0, 0.0
        while compared < check.parity_batches:
            for crops, expected in zip(run.loader, reference, strict=True):
                run.forward_backward(run.prepare(crops, run.step))
                run.update()
                assert torch.equal(crops.rows, expected.rows), "other images, or another order"
                torch.testing.assert_close(crops.windows, expected.windows)
                assert torch.equal(crops.flips, expected.flips), "other flips"
                apart = (crops.images.cpu().float() - expected.images.float()).abs()
                apart = apart.mean((1, 2, 3))
                worst, total = max(worst, apart.max().item()), total + apart.mean().item()
                compared += 1
        yield (
            f"{compared} batches of {check.batch_size}, mean difference {total / compared:.3f} of "
            f"255, worst image {worst:.3f}"
        )
        if worst > _CLOSE:
            raise RuntimeError(f"an image differs by {worst:.2f} of 255, mean over its pixels")


def _waits(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    with _run(check, urls) as run:
        take_steps(run, check.steps)  # what is compiled or allocated once, is by now
        with warnings.catch_warnings(record=True) as caught, _sync_debug(check.device):
            warnings.simplefilter("always")
            take_steps(run, check.steps)
        waits = Counter(
            f"{Path(each.filename).name}:{each.lineno}"
            for each in caught
            if _SYNC in str(each.message)
        )
        for place, times in waits.most_common():
            yield f"the host waited {times} times at {place}"
        if waits:
            raise RuntimeError(f"the hot loop waits for the GPU at {len(waits)} places")
        yield "the host never waited" if check.device == "cuda" else "no GPU to wait for"


@contextmanager
def _sync_debug(device: str) -> Iterator[None]:
    """Let torch warn of every operation that makes the host wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _run(check: GpuCheck, urls: list[str]) -> Iterator[Run]:
    """A run with the cached score and rolling attention."""
    options = BenchmarkOptions(
        model=check.model, batch_size=check.batch_size, precision="bf16", device=check.device
    )
    with measure.scored(urls) as (_, cache):
        config = options.config(urls, cache.url, "--recipe famt --frequency.source cached")
        with open_run(config) as run:
            yield run


if __name__ == "__main__":
    run_program(main, parsed(GpuCheck, __doc__))
