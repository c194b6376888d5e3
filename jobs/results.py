"""Train and evaluate a grid of runs, and write a table and a page of results.

    famt results docs/grids/quick.toml                 # everything that is left to do
    famt results docs/grids/quick.toml --minutes 30    # 30 minutes of it
    famt results docs/grids/quick.toml --minutes 0     # the table alone, from the logs
    famt results docs/results/quick.json.gz            # the table of a published grid
    famt results docs/results/quick.json.gz --plot quick.svg
    ray job submit --working-dir . -- famt results /shared/grid.toml --gpus 8 --cpus 64

A grid is a TOML file; docs/results-grids.md describes it. The job first times a step of every row
against the reference, in a few minutes. Then it trains each row with every seed, monitors it on a
held-out part of the training set (`--monitor`), and evaluates it once on val. As many runs go on at
once as the machine or the Ray cluster has room for. Ctrl-C, SIGTERM and SIGKILL are safe: runs
resume from their last checkpoint, and nothing in the logs is repeated. Table and page come from the
logs alone.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import ray
from tqdm import tqdm

from famt.jobs.cluster import start_ray
from famt.jobs.costs import StepCost, measured, step_key
from famt.jobs.grid import Grid, Training, load
from famt.jobs.options import Results
from famt.jobs.tables import GridResult, RowResult, probes_against_cost, table
from famt.pipeline.errors import UserError
from famt.pipeline.progress import progress_bar
from famt.train import report, run_log
from famt.train.command_line import parsed, run_program
from famt.train.comparison import Group
from famt.train.distributed import SEEN_WITHIN
from famt.train.run_folder import await_folder, written_whole

_LEAVE = 60.0  # seconds for runs to write a checkpoint and leave


def main(results: Results) -> int:
    """Run the rest of the grid, then write the table; returns 1 if a run failed."""
    if results.grid.suffix == ".gz":
        _show(GridResult.read(results.grid), results.plot)
        return 0
    if results.gpus > 1 and results.gpus % 1:
        raise UserError(f"--gpus {results.gpus}: give a whole number, or less than one")
    end = time.monotonic() + 60 * results.minutes if results.minutes is not None else None
    grid = load(results.grid, results.out)
    grid.out.mkdir(parents=True, exist_ok=True)
    may_run = results.minutes != 0
    costs = _costs(grid, results, may_run)
    rows = {
        row.name: grid.trainings(row, grid.epochs_of(row, costs))
        for row in grid.row
        if costs.keys() >= {row.name, grid.reference}
    }
    of_seeds = zip(*rows.values(), strict=True)  # all rows with the first seed come first
    lacking = [each for seed in of_seeds for each in seed if each.left()] if may_run else []
    failed = bool(lacking) and _run_all(grid, lacking, results, end)
    _show(_write(grid, costs, rows), results.plot)
    return int(failed)


def _show(result: GridResult, plot: Path | None) -> None:
    print(table(result))
    if plot:
        probes_against_cost(result).savefig(plot)


def _costs(grid: Grid, results: Results, may_measure: bool) -> dict[str, StepCost]:
    """Cost of a step of each row: from `<out>/costs.jsonl`, or measured now."""
    path = grid.out / "costs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(each["step"], each["reference"]): StepCost(**each["cost"]) for each in lines}
    configs = {row.name: grid.config(row) for row in grid.row}
    reference, costs = configs[grid.reference], {}
    for name, config in configs.items():
        key = step_key(config), step_key(reference)
        if key not in known and may_measure:
            print(f"timing the steps of {name}", flush=True)
            try:
                known[key] = ray.get(_task(measured, results).remote(config, reference))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            line = {"row": name, "cost": asdict(known[key]), "step": key[0], "reference": key[1]}
            lines.append(line)
            with written_whole(path) as file:
                file.writelines(f"{json.dumps(each)}\n".encode() for each in lines)
        if key in known:
            costs[name] = known[key]
    return costs


def _task(function, results: Results):  # type: ignore[no-untyped-def]  # as Ray's own are
    """The function as a Ray task with the CPUs and GPUs of a run.

    Raises:
        UserError: Ray runs on this machine alone, which has too few.
    """
    start_ray()
    asked = {"CPU": results.cpus, "GPU": results.gpus}
    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    if not any(all(node.get(name, 0) >= n for name, n in asked.items()) for node in nodes):
        lack = f"no machine has --cpus {results.cpus} and --gpus {results.gpus:g}"
        if os.environ.get("RAY_ADDRESS", "local") == "local":
            raise UserError(lack)
        print(f"{lack} yet; waiting for one to join the cluster", file=sys.stderr)
    # Runs of a lost machine resume elsewhere from their checkpoints.
    return ray.remote(max_calls=1)(function).options(  # else a worker keeps the memory of a call
        num_cpus=results.cpus, num_gpus=results.gpus, max_retries=-1,
        # Ray leaves all GPUs visible to a task that asked for none.
        runtime_env={} if results.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
    )  # fmt: skip


def _run_all(grid: Grid, lacking: Sequence[Training], results: Results, end: float | None) -> bool:
    """Run until all is done, time is up or a signal arrives; returns whether a run failed."""
    task = _task(run, results)
    running = {task.remote(each, results.cpus, int(results.gpus)): each for each in lacking}
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.default_int_handler)
    failed = False
    try:
        with progress_bar(total=len(lacking), desc=grid.title, unit="run") as bar:
            while running:
                left = max(0.0, end - time.monotonic()) if end is not None else None
                ready, _ = ray.wait([*running], timeout=left)
                if not ready:
                    raise KeyboardInterrupt  # time is up
                each = running.pop(ready[0])
                if problem := ray.get(ready[0]):
                    tqdm.write(f"{each.folder}: {problem}", file=sys.stderr)
                    failed = True
                bar.update()
    except KeyboardInterrupt:
        for task in running:
            ray.cancel(task)
        ray.wait([*running], num_returns=len(running), timeout=_LEAVE)
    finally:
        ray.shutdown()
    return failed


def run(training: Training, threads: int, gpus: int) -> str:
    """Run the remaining commands of a training in a Ray task; returns the error, or ""."""
    # Ray cancels by SIGINT, which programs that a shell starts with `&` inherit as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    await_folder(training.folder, SEEN_WITHIN)  # Ray starts the run of a lost worker at once
    for command in training.left(gpus):
        if code := _call(command, training.grid, threads, own_ray=gpus > 0):
            return f"exit code {code}, see {training.grid.out / 'output.txt'}"
        if not any(line.get("event") == "finished" for line in training.log()):
            return ""  # stopped by someone else: nothing to evaluate yet
    return ""


def _call(command: Sequence[str], grid: Grid, threads: int, *, own_ray: bool) -> int:
    """Run a program at low priority, tied to the life of this one; returns its exit code.

    Args:
        own_ray: let its refresh job start a Ray of its own, on the GPUs that the run holds whole:
            the cluster has given them away. Else the job asks the cluster for room.
    """
    address = "local" if own_ray else ray.get_runtime_context().gcs_address
    with open(grid.out / "output.txt", "ab") as output:
        output.write(f"\n$ {shlex.join(command[1:])}\n".encode())
        output.flush()
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "nice", "-n", "19", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "RAY_ADDRESS": address},
        )
    try:
        while process.poll() is None:
            time.sleep(0.5)  # Ray's cancel does not interrupt wait()
    except KeyboardInterrupt:
        process.terminate()  # a training writes a checkpoint before it exits
        process.wait()
        raise
    return process.returncode


def _write(grid: Grid, costs: dict[str, StepCost], rows: dict[str, list[Training]]) -> GridResult:
    """Write table, logs and page."""
    step_costs = {name: costs[name].of(each[0].config) for name, each in rows.items()}
    results = []
    for row in grid.row:
        done = rows.get(row.name, [])
        epochs = done[0].epochs if done else grid.epochs
        cost = step_costs[row.name] / step_costs[grid.reference] if done else None
        logs = [each.log() for each in done if not each.left()]
        results.append(RowResult(name=row.name, epochs=epochs, cost=cost, logs=logs))
    result = GridResult(title=grid.title, reference=grid.reference, rows=results)
    (grid.out / "results.md").write_text(table(result))
    result.write(grid.out / "results.json.gz")
    # From the folders, which have the pictures.
    runs = {
        name: [run_log.read(each.folder) for each in done if not each.left()]
        for name, done in rows.items()
    }
    if runs.get(grid.reference):
        steps = runs[grid.reference][0].total_steps
        groups = [
            Group(each.name, runs[each.name], (each.cost or 0.0) / steps)
            for each in results
            if each.logs
        ]
        cost_title = f"cost, share of {grid.reference}'s"
        report.write(grid.out / "results.html", groups, grid.title, cost_title)
    return result


if __name__ == "__main__":
    run_program(main, parsed(Results, __doc__))
