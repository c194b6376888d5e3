"""A grid of runs as a TOML file declares it, and the table of what they reached."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.history import History
from train.report import METRICS, last, percent


@dataclass(frozen=True)
class Row:
    """A recipe of a grid.

    Attributes:
        name: of the row, and of its runs' folders.
        options: of `train.pretrain`, besides those of the grid.
        cost: time of a step, of that of the reference.
        equal_cost: train for as many epochs as cost what the reference's cost.
    """

    name: str
    options: str
    cost: float
    equal_cost: bool


@dataclass(frozen=True)
class Grid:
    """Rows, seeds and evaluations; attributes as in docs/results-grids.md."""

    title: str
    out: Path
    train: list[str]
    val: list[str]
    cache: str
    epochs: int
    seeds: list[int]
    options: str
    reference: str
    evaluations: dict[str, str]
    rows: list[Row]

    def folder(self, row: Row, seed: int) -> Path:
        """Of a run; another one as soon as anything is trained differently."""
        told = json.dumps([self.train, self.epochs_of(row), self.options, row.options])
        digest = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
        return self.out / "runs" / f"{row.name}-{digest}-{seed}"

    def epochs_of(self, row: Row) -> int:
        """How long a row is trained."""
        return round(self.epochs / row.cost) if row.equal_cost else self.epochs


def load(path: Path) -> Grid:
    """Read a grid, and the costs of its steps from the lines that it names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing or unknown, a name stands twice, or a step was not measured.
    """
    try:
        told: dict[str, Any] = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        costs = _costs(Path(told.pop("costs"))) if "costs" in told else {}
        rows = [_row(path, each, costs) for each in told.pop("row")]
        grid = Grid(**{**told, "out": Path(told["out"])}, rows=rows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a key is missing or unknown: {error}") from None
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two rows have one name")
    if grid.reference not in names:
        raise ValueError(f"{path}: reference {grid.reference!r} is no row")
    return grid


def table(grid: Grid, runs: dict[str, list[History]]) -> str:
    """Markdown of what the finished runs reached.

    A row's cost is its steps times their relative time, as a share of the reference's. `reached at`
    is the least cost at which its runs' held-out probe, as the monitor saw it, was the reference's
    last one; a mean over the seeds, of those rows whose seeds all came there.
    """
    known = {
        f"{name} ({where})": (evaluator, start + value)
        for name, by in METRICS.items()
        for evaluator, value in by.items()
        if evaluator != "monitor"
        for where, start in (("held out", "held_out_"), ("val", ""))
    }
    places = {
        name: place
        for name, place in known.items()
        if any(last(run, *place) is not None for each in runs.values() for run in each)
    }
    heads = ["recipe", "seeds", "epochs", "cost", "reached at", *places]
    reference = runs[grid.reference]
    whole = reference[0].total_steps if reference else math.nan
    lines = [f"# {grid.title}", "", _rules(grid), "", _line(heads), _line(["---"] * len(heads))]
    for row in grid.rows:
        mine = runs[row.name]
        if not mine:
            lines.append(_line([row.name, "0", "not measured yet", *["–"] * (len(heads) - 3)]))
            continue
        few = "" if len(mine) >= 3 else " (no claim)"
        figures = [
            percent([found for run in mine if (found := last(run, *place)) is not None])
            for place in places.values()
        ]
        cost = mine[0].total_steps * row.cost / whole
        reached = _reached(row, mine, reference, whole)
        lines.append(
            _line(
                [
                    row.name,
                    f"{len(mine)}{few}",
                    str(grid.epochs_of(row)),
                    f"{cost:.2f}",
                    reached,
                    *figures,
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _rules(grid: Grid) -> str:
    return (
        "Percent of images, mean ± standard error over seeds; rows of fewer than 3 seeds claim "
        "nothing. Choices are made by the figures on images held out of the training set; val is "
        "read once, after the last step. Cost: steps x "
        f"the measured time of a step, as a share of that of `{grid.reference}`."
    )


def _reached(row: Row, mine: list[History], reference: list[History], whole: float) -> str:
    key = "probe_mean"
    goals = [goal for run in reference if (goal := last(run, "monitor", key)) is not None]
    if not goals:
        return "–"
    goal, costs = statistics.mean(goals), []
    for run in mine:
        steps = [
            each.step
            for each in run.found
            if each.evaluator == "monitor" and each.values.get(key, -1.0) >= goal
        ]
        if not steps:
            return "not reached"
        costs.append(min(steps) * row.cost / whole)
    return f"{statistics.mean(costs):.2f}"


def _row(path: Path, told: dict[str, Any], costs: dict[str, float]) -> Row:
    unknown = told.keys() - {"name", "options", "cost", "equal_cost"}
    if unknown:
        raise ValueError(f"{path}: unknown keys of a row: {sorted(unknown)}")
    cost = 1.0
    for name in told.get("cost", []):
        if name not in costs:
            raise ValueError(
                f"{path}: no measured step {name!r} for row {told['name']!r}; there are "
                f"{sorted(costs)}. Add lines of `python -m jobs.benchmark step attention`"
            )
        cost *= costs[name]
    return Row(told["name"], told.get("options", ""), cost, told.get("equal_cost", False))


def _costs(path: Path) -> dict[str, float]:
    """Ratios of steps by the names of what was timed, of the lines that `jobs.benchmark` prints."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no measured steps; on a quiet machine, `python -m jobs.benchmark step "
            f"attention --help` tells how to measure them; write what it prints to {path}"
        )
    costs = {}
    for line in path.read_text().splitlines():
        told = json.loads(line)
        for start in ("ms an image of a step of ", "ms an image of a step with "):
            if told["unit"].startswith(start):
                costs[told["unit"].removeprefix(start).partition(",")[0]] = float(told["ratio"])
    return costs


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
