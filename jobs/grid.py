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
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro

from famt.jobs.costs import StepCost, measured
from famt.pipeline.errors import UserError
from famt.pipeline.options import FREE
from famt.train.config import Pretrain, parse
from famt.train.evaluate.options import Evaluation
from famt.train.evaluate.run import EVALUATORS
from famt.train.history import History
from famt.train.report import METRICS, last, percent

_NOTHING = "–"  # in a cell
_EVALUATIONS = ("knn", "probe", "segment")  # fine-tuning is a run of its own


@dataclass(frozen=True)
class Row:
    """A recipe of a grid.

    Attributes:
        name: of the row, and of its runs' folders.
        options: of `famt.train.pretrain`, besides those of the grid.
        epochs: passes over the data.
        cost: of a step, refreshes of scores among it, over that of the reference; NaN if its steps
            have not been timed yet.
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
        """What `famt.train.pretrain` is given, but for the folder and the seed of a run."""
        return [
            "--shards", *self.train, "--cache", self.cache, "--epochs", str(row.epochs),
            *shlex.split(self.options), *shlex.split(row.options),
        ]  # fmt: skip

    def config(self, row: Row) -> Pretrain:
        """The options of a row's runs.

        Raises:
            ValueError: they are wrong; names the row.
        """
        try:
            return parse([*self.arguments(row), "--out", str(self.out)], None)
        except SystemExit:  # tyro has said on stderr which option, and why
            raise UserError(f"row {row.name!r}: its options are wrong, as told above") from None

    def evaluation(self, name: str, checkpoint: str = "") -> tuple[list[str], Evaluation]:
        """What `famt.train.evaluate` is given for an evaluation, and what it makes of it.

        Raises:
            ValueError: there is no evaluation of this name, or its options are wrong.
        """
        if name not in _EVALUATIONS:
            raise UserError(f"evaluation {name!r}: there are {', '.join(_EVALUATIONS)}")
        arguments = [
            "--checkpoint", checkpoint, "--cache", self.cache, "--train", *self.train,
            "--val", *self.val, *shlex.split(self.evaluations[name]),
        ]  # fmt: skip
        try:
            return arguments, tyro.cli(EVALUATORS[name][0], args=arguments)
        except SystemExit:
            raise UserError(f"evaluation {name!r}: its options are wrong, as told above") from None

    def judged(self, history: History) -> History:
        """A run with no other evaluations than the grid's own, made of its last step."""
        found = [
            replace(each, weights="trained")  # or an average of them, if the grid asks for that
            for each in history.found
            if each.evaluator == "monitor"
            or (each.step, each.weights, each.options)
            == (history.total_steps, *self._asked.get(each.evaluator, ("", {})))
        ]
        return replace(history, found=found)

    @cached_property
    def _asked(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Of each evaluation: which weights it is of, and what else its values depend on."""
        asked = {name: self.evaluation(name)[1] for name in self.evaluations}
        return {name: (each.weights, each.told()) for name, each in asked.items()}

    def folder(self, row: Row, seed: int) -> Path:
        """Of a run of one of the rows; another one as soon as anything is trained differently."""
        return self.out / "runs" / f"{row.name}-{self._digests[row.name]}-{seed}"

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Of what each row trains."""
        digests = {}
        for row in self.rows:
            # What the options come to, by whatever recipe: its file may change.
            differing = self.config(row).differing()
            options = [(name, value) for name, value, notes in differing if FREE not in notes]
            told = json.dumps([self.train, options])
            digests[row.name] = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
        return digests


Measure = Callable[[Path, Mapping[str, Pretrain], str], dict[str, StepCost]]


def load(path: Path, measure: Measure = measured, out: Path | None = None) -> Grid:
    """Read a grid, and find what its steps cost.

    Args:
        measure: gives the costs of runs by name, of all or of those that are known; takes the file
            `costs.jsonl` in the grid's `out`, the runs, and the name of the reference.
        out: folder in place of the grid's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or an option is missing, unknown or wrong, or a name stands twice.
    """
    try:
        told: dict[str, Any] = tomllib.loads(path.read_text())
        epochs, declared = told.pop("epochs"), told.pop("row")
        rows = [Row(row["name"], row.get("options", ""), epochs, math.nan) for row in declared]
        grid = Grid(**{**told, "out": out or Path(told["out"])}, rows=rows)
        _check(grid, declared)
        runs = {row.name: grid.config(row) for row in rows}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a key is missing or unknown: {error}") from None
    costs = measure(grid.out / "costs.jsonl", runs, grid.reference)
    if grid.reference not in costs:
        return grid
    whole = _spent(costs[grid.reference], runs[grid.reference])
    of_reference = costs[grid.reference].of(runs[grid.reference])
    planned = []
    for row, share in zip(rows, (each.get("cost") for each in declared), strict=True):
        if (cost := costs.get(row.name)) is not None:
            run = runs[row.name]
            epochs = run.epochs if share is None else _epochs(cost, run, share * whole)
            if not epochs:
                raise UserError(f"{path}: row {row.name!r}: a cost of {share} pays for no epoch")
            per_step = cost.of(replace(run, epochs=epochs)) / of_reference
            row = replace(row, epochs=epochs, cost=per_step)
        planned.append(row)
    return replace(grid, rows=planned)


def _check(grid: Grid, declared: list[dict[str, Any]]) -> None:
    """Refuse what would only be noticed after hours.

    Raises:
        ValueError: names it.
    """
    for name in ("train", "val", "seeds"):
        kind = int if name == "seeds" else str
        value = getattr(grid, name)
        if (
            not isinstance(value, list)
            or not value
            or any(type(each) is not kind for each in value)
        ):
            raise UserError(f"{name} must be a list of {kind.__name__}, not {value!r}")
    if len(set(grid.seeds)) < len(grid.seeds):
        raise UserError(f"seeds {grid.seeds}: one stands twice, and would count as two")
    if len({row.name for row in grid.rows}) < len(grid.rows):
        raise UserError("two rows have one name")
    if grid.reference not in {row.name for row in grid.rows}:
        raise UserError(f"reference {grid.reference!r} is no row")
    for row in declared:
        if unknown := row.keys() - {"name", "options", "cost"}:
            raise UserError(f"unknown keys of a row: {sorted(unknown)}")
    for name in grid.evaluations:
        grid.evaluation(name)


def _spent(cost: StepCost, run: Pretrain) -> float:
    """Cost of a run, in steps of the reference on batches of one crop of each image."""
    return cost.of(run) * run.epochs * run.crops_per_image / run.batch_size


def _epochs(cost: StepCost, run: Pretrain, budget: float) -> int:
    """Epochs that come nearest to a cost, 0 if half of one is too much already."""

    def missed(epochs: int) -> float:
        return abs(_spent(cost, replace(run, epochs=epochs)) - budget) if epochs else budget

    epochs = 0
    while missed(epochs + 1) < missed(epochs):
        epochs += 1
    return epochs


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
    reference = runs[grid.reference]
    whole = reference[0].total_steps if reference else None
    lines = []
    for row in grid.rows:
        mine = runs[row.name]
        line = {"recipe": row.name, "seeds": str(len(mine)), "epochs": "not measured yet"}
        if mine:
            line["seeds"] += "" if len(mine) >= 3 else " (no claim)"
            line["epochs"] = str(row.epochs)
            if whole:
                line["cost"] = f"{mine[0].total_steps * row.cost / whole:.2f}"
                line["reached at"] = _reached(row, mine, reference, whole)
            for name, place in places.items():
                found = [value for run in mine if (value := last(run, *place)) is not None]
                line[name] = percent(found)
        lines.append(line)
    heads = ["recipe", "seeds", "epochs", "cost", "reached at", *places]
    if all(line.get("reached at", _NOTHING) == _NOTHING for line in lines):
        heads.remove("reached at")
    cells = [heads, ["---"] * len(heads)]
    cells += [[line.get(head, _NOTHING) for head in heads] for line in lines]
    return "\n".join([f"# {grid.title}", "", _rules(grid), "", *map(_line, cells)]) + "\n"


def _rules(grid: Grid) -> str:
    return (
        "Percent of images, mean ± standard error over seeds; rows of fewer than 3 seeds claim "
        "nothing. Choices are made by the figures on images held out of the training set; val is "
        "read once, after the last step. Cost: steps x "
        f"the measured time of a step, as a share of that of `{grid.reference}`."
    )


def _reached(row: Row, mine: list[History], reference: list[History], whole: float) -> str:
    goal, curve = _monitored(reference), _monitored(mine)
    if not goal or len(curve) < 2:  # a single look at the end says nothing of when
        return _NOTHING
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
