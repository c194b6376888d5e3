"""The results table and picture of a grid, and the file of log lines that reproduces them."""

from __future__ import annotations

import gzip
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import BaseModel

from famt.pipeline.wording import counted
from famt.train import run_log
from famt.train.comparison import METRICS, last, mean_and_error, percent
from famt.train.run_log import History

Place = tuple[str, str]
"""evaluator and value, as in logs"""

_NOTHING = "–"  # in a cell
_PROBE, _VAL = "Probe, ", " (val)"  # around the pooling, in headings


class RowResult(BaseModel):
    """Results of a row.

    Attributes:
        cost: mean cost of a step, refreshes included, as a share of the reference's; None before
            steps are timed.
        logs: log lines of each finished run.
    """

    name: str
    epochs: int
    cost: float | None
    logs: list[list[dict[str, Any]]]

    @property
    def runs(self) -> list[History]:
        """The logs, parsed."""
        return [run_log.parse(Path(self.name), log) for log in self.logs]


class GridResult(BaseModel):
    """Results of a grid; costs are shares of row `reference`."""

    title: str
    reference: str
    rows: list[RowResult]

    def write(self, path: Path) -> None:
        """Write the log lines that tell what was trained and found, with one loss per run, as
        compressed JSON."""
        needed, kept = ("start", "generation", "evaluation", "finished"), []
        for row in self.rows:
            ends = [[each for each in log if "event" not in each][-1] for log in row.logs]
            logs = [
                [line for line in log if line is end or line.get("event") in needed]
                for log, end in zip(row.logs, ends, strict=True)
            ]
            kept.append(row.model_copy(update={"logs": logs}))
        text = self.model_copy(update={"rows": kept}).model_dump_json()
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

    @classmethod
    def read(cls, path: Path) -> GridResult:
        """Read what `write` wrote."""
        return cls.model_validate_json(gzip.decompress(path.read_bytes()))


def table(result: GridResult) -> str:
    """Markdown table of the finished runs.

    Cost is steps times relative time of a step. `reached at` is the lowest cost at which the
    monitor's held-out probe equals the reference's final one, means over seeds.
    """
    runs = {row.name: row.runs for row in result.rows}
    places, costs = measured_places(result), whole_costs(result)
    reference = runs[result.reference]
    lines = []
    for row in result.rows:
        mine = runs[row.name]
        line = {"recipe": row.name, "seeds": str(len(mine)), "epochs": "not measured yet"}
        if mine:
            line["seeds"] += "" if len(mine) >= 3 else " (no claim)"
            line["epochs"] = str(row.epochs)
            if row.name in costs:
                line["cost"] = f"{costs[row.name]:.2f}"
                line["reached at"] = _reached(costs[row.name], mine, reference)
            for name, place in places.items():
                line[name] = percent(values_at(mine, place))
        lines.append(line)
    heads = ["recipe", "seeds", "epochs", "cost", "reached at", *places]
    if all(line.get("reached at", _NOTHING) == _NOTHING for line in lines):
        heads.remove("reached at")
    cells = [heads, ["---"] * len(heads)]
    cells += [[line.get(head, _NOTHING) for head in heads] for line in lines]
    rules = (
        "Percent of images, mean ± standard error over seeds; rows of fewer than 3 seeds claim "
        "nothing. Choices are made by the figures on images held out of the training set; val is "
        "read once, after the last step. Cost: steps x the measured time of a step, as a share of "
        f"that of `{result.reference}`."
    )
    text = [f"# {result.title}", "", rules, "", *(f"| {' | '.join(each)} |" for each in cells)]
    return "\n".join(text) + "\n"


def measured_places(result: GridResult) -> dict[str, Place]:
    """Where logs keep each metric of which any run has a value, by its heading in the table."""
    known = {
        f"{name} ({where})": (evaluator, start + value)
        for name, by in METRICS.items()
        for evaluator, value in by.items()
        if evaluator != "monitor"
        for where, start in (("held out", "held_out_"), ("val", ""))
    }
    every = [run for row in result.rows for run in row.runs]
    return {name: place for name, place in known.items() if values_at(every, place)}


def values_at(runs: Sequence[History], place: Place) -> list[float]:
    """The last value of each run that has one, in [0, 1]."""
    return [value for run in runs if (value := last(run, *place)) is not None]


def whole_costs(result: GridResult) -> dict[str, float]:
    """Cost of a whole run of each row that has one, as a share of the reference's."""
    steps = {row.name: row.runs[0].total_steps for row in result.rows if row.logs}
    whole = steps.get(result.reference)
    return {
        row.name: steps[row.name] * row.cost / whole
        for row in result.rows
        if whole and row.logs and row.cost is not None
    }


def probes_against_cost(result: GridResult) -> Figure:
    """Each row's linear probes on val against the cost of a run, a panel for each pooling.

    Points are means over seeds, with standard errors where there are several. A row without a cost
    or a probe is left out.
    """
    costs = whole_costs(result)
    places = {
        name.removeprefix(_PROBE).removesuffix(_VAL): place
        for name, place in measured_places(result).items()
        if name.startswith(_PROBE) and name.endswith(_VAL)
    }
    figure = Figure(figsize=(3 + 3.5 * len(places), 3.8), layout="constrained")
    for number, (pooling, place) in enumerate(places.items(), start=1):
        axes = figure.add_subplot(1, len(places), number)
        axes.set_title(pooling, fontsize=10)
        axes.set_xlabel(f"cost of a run, {result.reference} = 1")
        if number == 1:
            axes.set_ylabel("linear probe on val, %")
        for row, marker in zip(result.rows, cycle("os^vD<>Pp*hX"), strict=False):
            values = values_at(row.runs, place)
            if row.name in costs and values:
                mean, error = mean_and_error([100 * each for each in values])
                label = f"{row.name} ({counted(len(values), 'seed')})"
                axes.errorbar(costs[row.name], mean, error, fmt=marker, capsize=3, label=label)
    if figure.axes:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def _reached(cost: float, mine: Sequence[History], reference: Sequence[History]) -> str:
    goal, curve = _monitored(reference), _monitored(mine)
    if not goal or len(curve) < 2:  # one look tells no time
        return _NOTHING
    steps = [step for step, value in curve.items() if value >= goal[max(goal)]]
    return f"{min(steps) / mine[0].total_steps * cost:.2f}" if steps else "not reached"


def _monitored(runs: Sequence[History]) -> dict[int, float]:
    """Held-out probe by step, mean over runs, at the steps where the monitor saw all of them."""
    curves = [
        {each.step: each.values["probe_mean"] for each in run.found if each.evaluator == "monitor"}
        for run in runs
    ]
    steps = set.intersection(*map(set, curves)) if curves else set()
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}
