"""Train and evaluate a declared grid of runs, and write what it shows as a table and a page.

    python -m jobs.results docs/grids/quick.toml                 # all of it, or what is left of it
    python -m jobs.results docs/grids/quick.toml --minutes 30    # a piece of it
    python -m jobs.results docs/grids/quick.toml --workers 2     # two runs at once
    python -m jobs.results docs/grids/quick.toml --minutes 0     # only the table, from the logs

A grid is a TOML file; docs/results-grids.md tells what stands in it. First the steps of all rows
are timed beside the reference's, which takes a few minutes. Then each row is
trained with every seed, watched on a held-out part of the training set (`--monitor`), and read on
val once; beside a training whose scores are refreshed runs the job that does it. Stop it whenever
you like, by Ctrl-C, SIGTERM or SIGKILL: every run goes on from its last checkpoint, and what the
logs hold is not done again. Table and page are made from the logs alone.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Annotated

import tyro
from annotated_types import Ge

from jobs.grid import Grid, Row, load, table
from pipeline.options import Checked
from train import report
from train.history import History, read
from train.program import run_program


@dataclass(frozen=True)
class Results(Checked):
    """Which grid, and how much of it."""

    grid: Annotated[Path, tyro.conf.Positional]
    """TOML file"""
    minutes: Annotated[float | None, Ge(0)] = None
    """stop after so many; runs go on another time"""
    workers: Annotated[int, Ge(1)] = 1
    """runs at once; the machine's cores are parted between them"""


def main(results: Results) -> int:
    """Run what is left of the grid, then write the table; returns 1 if a run failed."""
    grid = load(results.grid)
    stop = Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    end = None if results.minutes is None else time.monotonic() + 60 * results.minutes
    work = [(row, seed) for seed in grid.seeds for row in grid.rows]  # a seed of all rows first

    def one(item: tuple[Row, int]) -> bool:
        with _following(grid, *item):
            return all(
                _call(command, grid, results.workers, stop, end) for command in left(grid, *item)
            )

    failed = False
    with ThreadPoolExecutor(results.workers) as threads:
        try:
            failed = not all(list(threads.map(one, work)))
        except KeyboardInterrupt:
            stop.set()
    runs = {row.name: histories(grid, row) for row in grid.rows}
    text = table(grid, runs)
    grid.out.mkdir(parents=True, exist_ok=True)
    (grid.out / "results.md").write_text(text)
    if runs[grid.reference]:
        steps = runs[grid.reference][0].total_steps
        report.write(
            grid.out / "results.html",
            [
                report.Group(row.name, runs[row.name], row.cost / steps)
                for row in grid.rows
                if runs[row.name]
            ],
            grid.title,
            f"cost, share of {grid.reference}'s",
        )
    print(text)
    return int(failed and not stop.is_set() and (end is None or time.monotonic() < end))


def left(grid: Grid, row: Row, seed: int) -> list[list[str]]:
    """The commands that a run still needs: training, then each evaluation that its log lacks."""
    folder = grid.folder(row, seed)
    history = _history(folder)
    python = [sys.executable, "-m"]
    commands = []
    if history is None or not history.finished:
        commands.append([
            *python, "train.pretrain", *grid.arguments(row), "--out", str(folder),
            "--seed", str(seed), "--monitor", *grid.train,
        ])  # fmt: skip
    done = {each.evaluator for each in history.found} if history and history.finished else set()
    for name, options in grid.evaluations.items():
        if name not in done:
            commands.append([
                *python, "train.evaluate", name, "--checkpoint", str(folder), "--cache", grid.cache,
                "--train", *grid.train, "--val", *grid.val, *shlex.split(options),
            ])  # fmt: skip
    return commands


def histories(grid: Grid, row: Row) -> list[History]:
    """Of the runs of a row that are over, evaluated on val."""
    return [
        history
        for seed in grid.seeds
        if not left(grid, row, seed) and (history := _history(grid.folder(row, seed)))
    ]


def _history(folder: Path) -> History | None:
    try:
        return read(folder)
    except ValueError:  # not begun, or before its first log point
        return None


@contextmanager
def _following(grid: Grid, row: Row, seed: int) -> Iterator[None]:
    """The job beside a training whose scores are refreshed."""
    config, history = grid.config(row), _history(grid.folder(row, seed))
    trained = history is not None and history.finished
    if trained or not config.refreshed_kinds or config.refresh.pin:
        yield
        return
    command = "jobs.refresh_scores", "--follow", str(grid.folder(row, seed))
    job = _start([sys.executable, "-m", *command], grid, threads=1)
    try:
        yield
    finally:
        job.terminate()
        job.wait()


def _start(command: Sequence[str], grid: Grid, threads: int) -> subprocess.Popen[bytes]:
    """A program at low priority, which ends with this one."""
    grid.out.mkdir(parents=True, exist_ok=True)
    with open(grid.out / "output.txt", "ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "nice", "-n", "19", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )


def _call(command: Sequence[str], grid: Grid, workers: int, stop: Event, end: float | None) -> bool:
    """Run a command at low priority; False if it failed, or was to stop before it was done."""
    if stop.is_set() or (end is not None and time.monotonic() >= end):
        return False
    print("$", shlex.join(command[2:]), flush=True)
    process = _start(command, grid, threads=max(1, (os.cpu_count() or 1) // workers))
    asked = False
    while True:
        try:
            code = process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            late = end is not None and time.monotonic() >= end
            if (late or stop.is_set()) and not asked:
                process.terminate()  # a training writes a checkpoint, and leaves
                asked = True
    if code and not asked:
        print(f"failed with exit code {code}; why stands in {grid.out / 'output.txt'}", flush=True)
    return code == 0 and not asked


if __name__ == "__main__":
    run_program(main, tyro.cli(Results, description=__doc__))
