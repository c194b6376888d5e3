"""A grid of runs as a TOML file declares it, and the table of what they reached."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import statistics
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.costs import StepCost, measured
from pipeline.options import FREE
from train.config import Pretrain, parse
from train.history import History
from train.report import METRICS, last, percent


@dataclass(frozen=True)
class Row:
    """A recipe of a grid.

    Attributes:
        name: of the row, and of its runs' folders.
        options: of `train.pretrain`, besides those of the grid.
        epochs: passes over the data.
        cost: of a step, refreshes of scores among it, over that of the reference.
    """

    name: str
    options: str
    epochs: int
    cost: float


@dataclass(frozen=True)
class Grid:
    """Rows, seeds and evaluations; attributes as in docs/results-grids.md."""

    title: str
    out: Path
    train: list[str]
    val: list[str]
    cache: str
    seeds: list[int]
    options: str
    reference: str
    evaluations: dict[str, str]
    rows: list[Row]

    def arguments(self, row: Row) -> list[str]:
        """What `train.pretrain` is given, but for the folder and the seed of a run."""
        return [
            "--shards", *self.train, "--cache", self.cache, "--epochs", str(row.epochs),
            *shlex.split(self.options), *shlex.split(row.options),
        ]  # fmt: skip

    def config(self, row: Row) -> Pretrain:
        """The options of a row's runs."""
        return parse([*self.arguments(row), "--out", str(self.out)], None)

    def folder(self, row: Row, seed: int) -> Path:
        """Of a run; another one as soon as anything is trained differently."""
        # What the options come to, by whatever recipe: its file may change.
        differing = self.config(row).differing()
        options = [(name, value) for name, value, notes in differing if FREE not in notes]
        told = json.dumps([self.train, options])
        digest = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
        return self.out / "runs" / f"{row.name}-{digest}-{seed}"


Measure = Callable[[Path, Mapping[str, Pretrain], str], dict[str, StepCost]]


def load(path: Path, measure: Measure = measured, out: Path | None = None) -> Grid:
    """Read a grid, and find what its steps cost.

    Args:
        measure: gives the costs of runs by name; those in `costs.jsonl` in the grid's `out` are
            taken from there.
        out: folder in place of the grid's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing or unknown, or a name stands twice.
    """
    try:
        told: dict[str, Any] = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        epochs, declared = told.pop("epochs"), told.pop("row")
        rows = [Row(row["name"], row.get("options", ""), epochs, math.nan) for row in declared]
        grid = Grid(**{**told, "out": out or Path(told["out"])}, rows=rows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a key is missing or unknown: {error}") from None
    if len({row.name for row in rows}) < len(rows):
        raise ValueError(f"{path}: two rows have one name")
    if grid.reference not in {row.name for row in rows}:
        raise ValueError(f"{path}: reference {grid.reference!r} is no row")
    for row in declared:
        if unknown := row.keys() - {"name", "options", "cost"}:
            raise ValueError(f"{path}: unknown keys of a row: {sorted(unknown)}")
    runs = {row.name: grid.config(row) for row in rows}
    costs = measure(grid.out / "costs.jsonl", runs, grid.reference)
    shares = {row["name"]: row.get("cost") for row in declared}
    whole = costs[grid.reference].of(runs[grid.reference])
    return replace(
        grid, rows=[_planned(row, grid, costs[row.name], shares[row.name], whole) for row in rows]
    )


def _planned(row: Row, grid: Grid, cost: StepCost, share: float | None, whole: float) -> Row:
    """With its cost, and with as many epochs as cost a share of the reference's if one is asked."""

    def of(row: Row) -> float:
        return cost.of(grid.config(row)) / whole

    if share is not None:
        row = replace(row, epochs=round(share * row.epochs / of(row)))
    return replace(row, cost=of(row))


def table(grid: Grid, runs: dict[str, list[History]]) -> str:
    """Markdown of what the finished runs reached.

    A row's cost is its steps times their relative time, as a share of the reference's. `reached at`
    is the least cost at which the held-out probe, as the monitor saw it, was the reference's last
    one; both are means over seeds.
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
                    str(row.epochs),
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
    goal, curve = _monitored(reference), _monitored(mine)
    if not goal or not curve:
        return "–"
    steps = [step for step, value in curve.items() if value >= goal[max(goal)]]
    return f"{min(steps) * row.cost / whole:.2f}" if steps else "not reached"


def _monitored(runs: list[History]) -> dict[int, float]:
    """Mean over runs of the held-out probe, by the steps at which all of them were looked at."""
    curves = [
        {each.step: each.values["probe_mean"] for each in run.found if each.evaluator == "monitor"}
        for run in runs
    ]
    steps = set.intersection(*map(set, curves)) if curves else set()
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
