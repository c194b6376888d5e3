"""Train and evaluate a declared grid of runs, and write what it shows as a table and a page.

    famt results docs/grids/quick.toml                 # all of it, or what is left of it
    famt results docs/grids/quick.toml --minutes 30    # a piece of it
    famt results docs/grids/quick.toml --minutes 0     # only the table, from the logs
    ray job submit --working-dir . -- famt results /shared/grid.toml --gpus 8 --cpus 64

A grid is a TOML file; docs/results-grids.md tells what stands in it. First the steps of all rows
are timed beside the reference's, which takes a few minutes. Then each row is trained with every
seed, watched on a held-out part of the training set (`--monitor`), and read on val once; beside a
training whose scores are refreshed runs the job that does it. As many runs go on at once as this
machine, or the Ray cluster, has room for. Stop it whenever you like, by Ctrl-C, SIGTERM or SIGKILL:
every run goes on from its last checkpoint, and what the logs hold is not done again. Table and page
are made from the logs alone.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayTaskError
from tqdm import tqdm

from famt.jobs.cluster import start_ray
from famt.jobs.costs import StepCost, known, measured
from famt.jobs.grid import Grid, Row, load, table
from famt.jobs.options import Results
from famt.pipeline.errors import UserError
from famt.train import report
from famt.train.config import Pretrain
from famt.train.history import History, read
from famt.train.program import parsed, run_program

_POLL = 0.5  # seconds
_LEAVE = 60.0  # seconds for runs to write a checkpoint and leave


def main(results: Results) -> int:
    """Run what is left of the grid, then write the table; returns 1 if a run failed."""
    if results.minutes == 0:
        print(_write(load(results.grid, known, results.out)))
        return 0
    end = time.time() + 60 * results.minutes if results.minutes is not None else None
    grid = load(results.grid, partial(_measured, results.cpus, results.gpus), results.out)
    work = [(row, seed) for seed in grid.seeds for row in grid.rows]  # a seed of all rows first
    lacking = [(row, seed) for row, seed in work if left(grid, row, seed)]
    failed = bool(lacking) and _run_all(grid, lacking, results.cpus, results.gpus, end)
    print(_write(grid))
    return int(failed)


def _start_ray(cpus: int, gpus: int) -> None:
    """Join the Ray cluster that there is, or start one here.

    Raises:
        ValueError: it is this machine alone, and a run asks for more than that has.
    """
    start_ray()
    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    if any(each.get("CPU", 0) >= cpus and each.get("GPU", 0) >= gpus for each in nodes):
        return
    lack = f"no machine has the {cpus} CPU core(s) and {gpus} GPU(s) of --cpus and --gpus"
    if len(nodes) == 1 and os.environ.get("RAY_ADDRESS", "local") == "local":
        raise UserError(lack)
    print(f"{lack} yet: the runs wait for one that joins the cluster", file=sys.stderr)


def _measured(
    cpus: int, gpus: int, path: Path, runs: Mapping[str, Pretrain], reference: str
) -> dict[str, StepCost]:
    """`famt.jobs.costs.measured`, where the runs train."""
    found = known(path, runs, reference)
    if found.keys() == runs.keys():
        return found
    print(f"timing the steps of {len(runs) - len(found)} recipe(s) for {path}", flush=True)
    _start_ray(cpus, gpus)
    task = ray.remote(measured).options(num_cpus=cpus, num_gpus=gpus)
    try:
        costs: dict[str, StepCost] = ray.get(task.remote(path, dict(runs), reference))
    except RayTaskError as error:
        raise error.cause from None
    return costs


def _run_all(
    grid: Grid, lacking: list[tuple[Row, int]], cpus: int, gpus: int, end: float | None
) -> bool:
    """Run until all is done, time is up or a signal asks to stop; whether a run failed."""
    grid.out.mkdir(parents=True, exist_ok=True)
    _start_ray(cpus, gpus)
    task = _run.options(num_cpus=cpus, num_gpus=gpus)
    running = {task.remote(grid, row, seed, cpus, gpus, end): (row, seed) for row, seed in lacking}
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.default_int_handler)
    failed = False
    bar = tqdm(total=len(lacking), desc=grid.title, unit="run")
    try:
        while running:
            ready, _ = ray.wait([*running], timeout=_POLL)
            for each in ready:
                row, seed = running.pop(each)
                problem = ray.get(each)
                if problem:
                    tqdm.write(f"{grid.folder(row, seed)}: {problem}", file=sys.stderr)
                    failed = True
                bar.update()
    except KeyboardInterrupt:
        for each in running:
            ray.cancel(each)
        ray.wait([*running], num_returns=len(running), timeout=_LEAVE)
    finally:
        bar.close()
        ray.shutdown()
    return failed


@ray.remote(max_retries=-1)  # a lost machine's runs go on elsewhere, from their checkpoints
def _run(grid: Grid, row: Row, seed: int, cpus: int, gpus: int, end: float | None) -> str:
    """What a run still needs, one after the other; returns why it failed, or nothing."""
    # Ray cancels by SIGINT, which what a shell starts with `&` ignores, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for command in left(grid, row, seed, gpus):
        problem = _call(command, grid, cpus, end)
        if problem is not None:
            return problem
        history = _history(grid, row, seed)
        if history is None or not history.finished:
            return ""  # asked to stop by somebody else: there is nothing to evaluate yet
    return ""


def left(grid: Grid, row: Row, seed: int, gpus: int = 0) -> list[list[str]]:
    """The commands that a run still needs: training, then each evaluation that its log lacks."""
    folder = grid.folder(row, seed)
    history = _history(grid, row, seed)
    python = [sys.executable, "-m"]
    commands = []
    if history is None or not history.finished:
        ranks = ["torch.distributed.run", "--nproc-per-node", str(gpus), "-m"] if gpus > 1 else []
        commands.append([
            *python, *ranks, "famt.jobs.pretrain", *grid.arguments(row), "--out", str(folder),
            "--seed", str(seed), "--monitor", *grid.train,
        ])  # fmt: skip
    done = {each.evaluator for each in history.found} if history and history.finished else set()
    for name in grid.evaluations:
        if name not in done:
            commands.append(
                [*python, "famt.train.evaluate", name, *grid.evaluation(name, str(folder))[0]]
            )
    return commands


def histories(grid: Grid, row: Row) -> list[History]:
    """Of the runs of a row that are over, evaluated on val."""
    return [
        history
        for seed in grid.seeds
        if not left(grid, row, seed) and (history := _history(grid, row, seed))
    ]


def _write(grid: Grid) -> str:
    """Write the table and the page; returns the table."""
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
    return text


def _history(grid: Grid, row: Row, seed: int) -> History | None:
    """Of a run, with the evaluations that the grid asks for."""
    try:
        return grid.judged(read(grid.folder(row, seed)))
    except ValueError:  # not begun, or before its first log point
        return None


def _call(command: Sequence[str], grid: Grid, threads: int, end: float | None) -> str | None:
    """Run a command at low priority; why it failed, "" if it was stopped, None if it is done."""
    if end is not None and time.time() >= end:
        return ""
    process = _start(command, grid, threads)
    asked = False
    try:
        while (code := _wait(process)) is None:
            if end is not None and time.time() >= end and not asked:
                process.terminate()  # a training writes a checkpoint, and leaves
                asked = True
    except KeyboardInterrupt:  # as Ray tells a task that it is cancelled
        process.terminate()
        process.wait()
        raise
    if asked:
        return ""
    return f"exit code {code}; why stands in {grid.out / 'output.txt'}" if code else None


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=_POLL)
    except subprocess.TimeoutExpired:
        return None


def _start(command: Sequence[str], grid: Grid, threads: int) -> subprocess.Popen[bytes]:
    """A program at low priority, which ends with this one; what it says is added to a file."""
    with open(grid.out / "output.txt", "ab") as output:
        output.write(f"\n$ {shlex.join(command[1:])}\n".encode())
        output.flush()
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "nice", "-n", "19", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            },
        )


if __name__ == "__main__":
    run_program(main, parsed(Results, __doc__))
