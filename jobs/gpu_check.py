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
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.attention import Attention
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.refresh import Refresh
from famt.jobs.benchmarks.runs import Runs
from famt.jobs.benchmarks.step import Step
from famt.jobs.benchmarks.training import take_steps
from famt.models import MODELS
from famt.pipeline.loader import CropLoader, own_cores
from famt.pipeline.options import Checked
from famt.pipeline.scores import ScoreSpec
from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run
from famt.train.program import parsed, run_program
from famt.train.signals.config import AttentionConfig, FrequencyConfig

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
    missing = None if check.device == "cpu" else _why_no_gpu()
    page = [f"# {_device_name(check.device)}", "", f"torch {torch.__version__}, {check}", ""]
    failed, began = False, time.monotonic()
    with contextlib.ExitStack() as opened:
        urls = [] if missing else opened.enter_context(measure.shards(check.shards, check.photos))
        for name, part in _PARTS.items():
            started = time.monotonic()
            late = started - began > 60 * check.minutes
            skipped = missing or (f"{check.minutes:g} minutes are over" if late else None)
            page += [f"## {name}", ""]
            verdict = f"skipped: {skipped}" if skipped else "passed"
            try:
                for line in [] if skipped else part(check, urls):
                    page.append(f"    {line}")
            except (AssertionError, OSError, RuntimeError, ValueError) as error:
                failed, verdict = True, f"FAILED: {type(error).__name__}: {error}"
            page += ["", f"{verdict}, {time.monotonic() - started:.0f} s", ""]
            print(f"{name}: {verdict}", flush=True)
            check.out.write_text("\n".join(page))
    print(f"results are in {check.out}")
    return int(failed)


def _why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"no GPU that torch can use (torch {torch.__version__} is {built})"


def _device_name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}"


def _tests(check: GpuCheck, urls: list[str]) -> Iterator[str]:
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
        on_gpu = check.device == "cuda"
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                take_steps(run, check.steps)
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
        waits = Counter(
            f"{Path(each.filename).name}:{each.lineno}"
            for each in caught
            if _SYNC in str(each.message)
        )
        for place, times in waits.most_common():
            yield f"the host waited {times} times at {place}"
        if waits:
            raise RuntimeError(f"the hot loop waits for the GPU at {len(waits)} places")
        yield "the host never waited" if on_gpu else "no GPU to wait for"


@contextmanager
def _run(check: GpuCheck, urls: list[str]) -> Iterator[Run]:
    """A run with the cached score and rolling attention, on made-up photos."""
    with (
        measure.scored(urls, ScoreSpec()) as (_, cache),
        tempfile.TemporaryDirectory(prefix="famt-run-") as out,
        join_ranks(check.device) as ranks,
    ):
        config = Pretrain(
            shards=urls,
            cache=cache.url,
            out=Path(out),
            model=check.model,
            batch_size=check.batch_size,
            frequency=FrequencyConfig(source="cached"),
            attention=AttentionConfig(source="rolling"),
            precision="bf16",
            device=check.device,
            picture_epochs=0,
        )
        yield Run(config, ranks)


def _runs(check: GpuCheck, urls: list[str], options: str = "") -> Iterator[str]:
    benchmark = Runs(
        urls,
        options=options,
        model=check.model,
        batch_size=check.batch_size,
        steps=check.steps,
        precision="bf16",
        device=check.device,
    )
    yield from map(json.dumps, benchmark.run())


def _step(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    yield from map(json.dumps, Step(batch_size=check.batch_size, **_options(check)).run())


def _loader(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    benchmark = Loader(
        urls,
        batch_size=check.batch_size,
        images=4 * check.photos,
        rounds=check.rounds,
        device=check.device,
    )
    yield from map(json.dumps, benchmark.run())


def _refresh(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    benchmark = Refresh(
        urls, batch_size=check.batch_size, step_batch_size=check.batch_size, **_options(check)
    )
    yield from map(json.dumps, benchmark.run())


def _attention(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    benchmark = Attention(urls, batch_size=check.batch_size, **_options(check))
    yield from map(json.dumps, benchmark.run())


def _options(check: GpuCheck) -> dict[str, Any]:
    return {
        "model": check.model,
        "precision": "bf16",
        "rounds": check.rounds,
        "threads": own_cores(),
        "device": check.device,
    }


_PARTS: dict[str, Callable[[GpuCheck, list[str]], Iterator[str]]] = {
    "tests": _tests,
    "parity": _parity,
    "waits": _waits,
    "runs": _runs,
    "compiled": partial(_runs, options="--compile"),
    "step": _step,
    "loader": _loader,
    "refresh": _refresh,
    "attention": _attention,
}


if __name__ == "__main__":
    run_program(main, parsed(GpuCheck, __doc__))
