"""Check on one GPU what only a GPU can show; exit code 0 if all passed, and a page of results.

    make gpu
    famt gpu-check --out gpu.md --minutes 10

    tests       the tests that need a GPU
    parity      crops of the GPU's loader against the CPU's, while a model trains
    waits       50 training steps under torch.cuda.set_sync_debug_mode("warn"): what makes the host
                wait for the GPU
    runs        crops/s of whole training runs, with peak memory
    step, loader
                these benchmarks, on the GPU and in bf16
    queues      whole runs of recipe famt without each of the ways in which the host does not wait
    checkpointed, compiled
                whole runs again, with --checkpoint-blocks and with --compile
    refresh, attention
                these benchmarks

The most telling parts come first, the page is written after each line, and none is begun after
`--minutes`. Without a GPU every part is skipped; `--device cpu` runs all of the code on a CPU.
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
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from unittest.mock import patch

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from famt.device_copies import Fetched
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.refresh import Refresh
from famt.jobs.benchmarks.runs import Runs
from famt.jobs.benchmarks.step import Attention, Step
from famt.jobs.benchmarks.training import BenchmarkOptions, open_run, take_steps
from famt.pipeline.errors import UserError
from famt.pipeline.loading.loader import CropLoader
from famt.train.command_line import parsed, run_program
from famt.train.pretrain import Run
from famt.train.run_folder import written_whole
from famt.train.side_stream import SideStream

_SYNC = "called a synchronizing CUDA operation"
_CLOSE = 0.5  # of 255, mean over an image: decoders and resampling kernels differ
_COMPARED = 20  # batches that are compared with the CPU's, at least
_MARK = "mark." + "gpu"
_FOR_TESTS = ("pytest", "pytest_timeout", "hypothesis")


@dataclass(frozen=True)
class GpuCheck(BenchmarkOptions):
    """What to check."""

    out: Path = Path("gpu.md")
    """page of results to write"""
    device: Literal["cuda", "cpu"] = "cuda"
    minutes: Annotated[float, Gt(0)] = 4.0
    """begin nothing after this time; the first part takes a minute to start"""
    batch_size: Annotated[int, Ge(2)] = 256
    photos: Annotated[int, Ge(2)] = 1024
    precision: Literal["fp32", "bf16"] = "bf16"
    steps: Annotated[int, Ge(1)] = 50
    """training steps to time or watch"""
    rounds: Annotated[int, Ge(1)] = 5
    """timed turns of each rival in a benchmark"""
    tests: bool = True
    """run the tests that need a GPU"""


def main(check: GpuCheck) -> int:
    """Check part by part; returns 1 if one failed, 0 if all passed or were skipped."""
    on_gpu = check.device == "cuda" and torch.cuda.is_available()
    missing = None if on_gpu or check.device == "cpu" else "torch finds no GPU"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}"
    built = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    page = [f"# {name}", "", f"{built}, {check}", ""]
    failed, end = False, time.monotonic() + 60 * check.minutes
    with contextlib.ExitStack() as opened:
        urls = [] if missing else opened.enter_context(measure.shards(check.shards, check.photos))
        for part, lines in _parts(check, urls, end).items():
            started, verdict = time.monotonic(), "passed"
            page += [f"## {part}", ""]
            try:
                if missing:
                    raise _SkippedError(missing)
                _keep_to(check, end)
                for line in lines:
                    page.append(f"    {line}")
                    _write(page, check.out)
            except _SkippedError as reason:
                verdict = f"skipped: {reason}"
            except (AssertionError, OSError, RuntimeError, ValueError, UserError) as error:
                failed, verdict = True, f"FAILED: {type(error).__name__}: {error}"
            page += ["", f"{verdict}, {time.monotonic() - started:.0f} s", ""]
            print(f"{part}: {verdict}", flush=True)
            _write(page, check.out)
    print(f"page: {check.out}")
    return int(failed)


class _SkippedError(Exception):
    """A part, or the rest of it, is left out for this reason."""


def _keep_to(check: GpuCheck, end: float) -> None:
    if time.monotonic() > end:
        raise _SkippedError(f"--minutes {check.minutes:g} are over")


def _write(page: list[str], out: Path) -> None:
    with written_whole(out) as file:
        file.write("\n".join(page).encode())


def _parts(check: GpuCheck, urls: list[str], end: float) -> dict[str, Iterator[str]]:
    """The parts, by name: iterators over lines of the page that run the check as they are read."""
    batch, rounds, images = check.batch_size, check.rounds, 4 * check.photos
    names = (each.name for each in fields(BenchmarkOptions))
    options: dict[str, Any] = {name: getattr(check, name) for name in names} | {"shards": urls}
    runs = Runs(steps=check.steps, **options)
    benchmarks = {
        "runs": runs.run(),
        "step": Step(rounds=rounds, **options).run(),
        "loader": Loader(urls, rounds, images, batch, check.threads, device=check.device).run(),
        "queues": _queues(replace(runs, recipes=("famt",))),
        "checkpointed": replace(runs, options="--checkpoint-blocks").run(),
        "compiled": replace(runs, options="--compile").run(),
        "refresh": Refresh(rounds=rounds, scored_at_once=batch, **options).run(),
        "attention": Attention(rounds=rounds, **options).run(),
    }
    return {
        "tests": _tests(check),
        "parity": _parity(check, urls),
        "waits": _waits(check, urls),
        **{name: _reports(each, check, end) for name, each in benchmarks.items()},
    }


def _reports(reports: Iterator[Report], check: GpuCheck, end: float) -> Iterator[str]:
    for report in reports:
        yield json.dumps(report)
        _keep_to(check, end)


def _tests(check: GpuCheck) -> Iterator[str]:
    if not check.tests:
        raise _SkippedError("--no-tests")
    lacking = [name for name in _FOR_TESTS if find_spec(name) is None]
    if lacking:
        raise _SkippedError(f"not installed: {', '.join(lacking)}")
    tests = Path(__file__).resolve().parents[1] / "tests"  # famt/jobs is a link
    if not tests.is_dir():
        raise _SkippedError(f"{tests} does not exist; run this from a checkout")
    # Other files may import packages that a GPU machine lacks.
    files = [str(each) for each in sorted(tests.rglob("test_*.py")) if _MARK in each.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent, check=False)
    yield from done.stdout.splitlines()[-20:]
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu ended with exit code {done.returncode}")


def _parity(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    with _run(check, urls) as run:
        reference = CropLoader(run.samples, run.loader.config, drop_last=True, seed=run.config.seed)
        means = torch.empty(0)  # of each image, absolute difference of 255
        while len(means) < _COMPARED * check.batch_size:
            for crops, expected in zip(run.loader, reference, strict=True):
                run.forward_backward(run.prepare(crops, run.step))
                run.update()
                assert torch.equal(crops.rows, expected.rows), "other images, or another order"
                torch.testing.assert_close(crops.windows, expected.windows)
                assert torch.equal(crops.flips, expected.flips), "other flips"
                apart = (crops.images.cpu().float() - expected.images.float()).abs()
                means = torch.cat([means, apart.mean((1, 2, 3))])
        mean, worst = means.mean().item(), means.max().item()
        yield f"{len(means)} crops, mean difference {mean:.3f} of 255, worst image {worst:.3f}"
        if worst > _CLOSE:
            raise RuntimeError(f"an image differs by {worst:.2f} of 255, mean over its pixels")


def _waits(check: GpuCheck, urls: list[str]) -> Iterator[str]:
    with _run(check, urls) as run:
        take_steps(run, check.steps)  # compile, allocate: what happens once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            on_gpu = check.device == "cuda"
            set_mode = torch.cuda.set_sync_debug_mode if on_gpu else lambda _: None
            set_mode("warn")
            try:
                take_steps(run, check.steps)
            finally:
                set_mode("default")
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


def _queues(runs: Runs) -> Iterator[Report]:
    """Crops/s of a run as it is, and of one that waits where it otherwise would not."""

    def wait(self: Fetched, tensor: Tensor) -> None:
        self._tensor, self._copied = tensor.cpu(), None

    none = SideStream(torch.device("cpu"))
    waiting: dict[str, Any] = {
        "a side stream": patch("famt.train.loop.SideStream", lambda _: none),
        "pinned copies": patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        "copies to the host behind the work": patch.object(Fetched, "__init__", wait),
    }
    (whole,) = runs.run()
    yield whole
    for name, patched in waiting.items():
        with patched:
            (report,) = runs.run()
        unit, figure = f"{report['unit']}, without {name}", cast(float, report["figure"])
        yield measure.line("queues", unit, figure, "with them", cast(float, whole["figure"]))


@contextmanager
def _run(check: GpuCheck, urls: list[str]) -> Iterator[Run]:
    """A run of recipe `famt` with the cached score."""
    with measure.scored(urls) as (_, cache):
        config = check.config(urls, cache.url, "--recipe famt --frequency.source cached")
        with open_run(config) as run:
            yield run


if __name__ == "__main__":
    run_program(main, parsed(GpuCheck, __doc__))
