"""Comparing runs: which of them differ only in their seeds, and which results compare."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from famt.pipeline.options import FREE, annotated
from famt.train.config import REQUIRED, Pretrain
from famt.train.evaluate.evaluators import EVALUATORS
from famt.train.evaluate.evaluators.finetune import Finetune
from famt.train.run_log import Basis, Found, History, Point

METRICS = {
    title: {"monitor": value.replace("top1", name), name: value}
    for name, evaluator in EVALUATORS.items()
    for title, value in evaluator.metrics.items()
}
"""What is compared -> by evaluator, the name of its value, in [0, 1]."""

DATA = "images trained on (digest)"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds.

    Attributes:
        name: what their folders' names have in common.
        runs: at least one.
        cost_per_step: cost of a step; None takes the logged time.
    """

    name: str
    runs: list[History]
    cost_per_step: float | None = None

    @property
    def seeds(self) -> int:
        """Number of different seeds."""
        return len({run.options.get("seed") for run in self.runs})

    @property
    def ends(self) -> list[Point]:
        """The last log point of each run."""
        return [run.points[-1] for run in self.runs]

    @property
    def loss(self) -> float:
        """Mean of the last losses."""
        return statistics.mean(end.loss for end in self.ends)

    def cost(self, run: History, step: int) -> float:
        """Cost of a run until a step: seconds, or steps times `cost_per_step`."""
        return run.seconds(step) if self.cost_per_step is None else step * self.cost_per_step

    def label(self, run: History) -> str:
        """Name of one of its runs."""
        seed = f", seed {run.options.get('seed')}" if len(self.runs) > 1 else ""
        return f"{self.name}{seed}"


class Column(NamedTuple):
    """A metric on a basis; `kind` is a display name of evaluator and basis."""

    metric: str
    evaluator: str
    value: str
    kind: str
    basis: Basis

    @property
    def title(self) -> str:
        """Heading of the column."""
        return f"{self.metric} ({self.kind.rpartition(', ')[2]}, %)"

    @property
    def weight(self) -> tuple[bool, bool, int]:
        """Orders columns by how much they say: evaluations more than the monitor, probes most."""
        is_probe = self.metric.startswith("Probe")
        return self.evaluator != "monitor", is_probe, list(METRICS).index(self.metric)

    def of(self, group: Group, weights: str = "trained") -> list[float]:
        """The last value of each run that has one."""
        values = (last(run, self.evaluator, self.value, self.basis, weights) for run in group.runs)
        return [each for each in values if each is not None]

    def holds(self, found: Found) -> bool:
        """Whether a result belongs to this column."""
        place = found.evaluator, found.weights, found.basis
        return place == (self.evaluator, "trained", self.basis) and self.value in found.values


def gather(runs: Sequence[History]) -> list[Group]:
    """Group runs that differ only in their seeds."""
    alike: dict[str, list[History]] = {}
    for run in runs:
        alike.setdefault(json.dumps(identity(run), sort_keys=True), []).append(run)
    names = [_common_name(members) for members in alike.values()]
    if len(set(names)) < len(names):
        names = [str(members[0].folder) for members in alike.values()]
    return [Group(name, members) for name, members in zip(names, alike.values(), strict=True)]


def columns_of(groups: Sequence[Group]) -> list[Column]:
    """The columns for which any run has a value."""
    columns = (
        Column(metric, evaluator, value, kind, basis)
        for metric, places in METRICS.items()
        for evaluator, value in places.items()
        for kind, basis in _bases(groups, evaluator).items()
    )
    return [each for each in columns if any(each.of(group) for group in groups)]


def identity(run: History) -> dict[str, Any]:
    """Options that decide what a run learns, except the seed, and the digest of its data."""
    options = {name: value for name, value in run.options.items() if name not in _free()}
    return options if run.data is None else {**options, DATA: run.data}


def last(
    run: History,
    evaluator: str,
    value: str,
    basis: Basis | None = None,
    weights: str = "trained",
) -> float | None:
    """An evaluator's value at the latest step that it evaluated.

    Args:
        basis: that it was measured on; None takes any.
        weights: of the encoder: trained, ema or untrained.
    """
    found = [
        each
        for each in run.found
        if (each.evaluator, each.weights) == (evaluator, weights)
        and value in each.values
        and basis in (None, each.basis)
    ]
    return float(max(reversed(found), key=lambda each: each.step).values[value]) if found else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error over seeds; the error of a single seed is None."""
    if len(values) == 1:
        return values[0], None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def percent(values: Sequence[float]) -> str:
    """Shares as `51.5 ± 0.2` percent, mean and standard error; `–` for none."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def default_options() -> tuple[Pretrain, Finetune]:
    """Both kinds of training, with default options."""
    tuned = Finetune(checkpoint="", cache="", train=[], val=[], out=Path())
    return Pretrain(**REQUIRED), tuned


def _bases(groups: Sequence[Group], evaluator: str) -> dict[str, Basis]:
    """The bases of an evaluator's results by name: `knn, test`, or `knn, test 2`."""
    bases = dict.fromkeys(
        each.basis
        for group in groups
        for run in group.runs
        for each in run.found
        if each.evaluator == evaluator and each.weights == "trained"
    )
    name = evaluator if evaluator == "monitor" else f"{evaluator}, test"
    return {f"{name} {n}" if len(bases) > 1 else name: each for n, each in enumerate(bases, 1)}


@cache
def _free() -> set[str]:
    options = (each for kind in default_options() for each in annotated(kind))
    return {"seed", *(name for name, _, notes in options if FREE in notes)}


def _common_name(runs: Sequence[History]) -> str:
    names = [run.folder.resolve().name for run in runs]
    if len(names) == 1:
        return names[0]
    shared = {re.sub(r"[-_.]*(seed)?[-_.]*\d+$", "", name) for name in names}
    return shared.pop() if len(shared) == 1 else " + ".join(names)
