"""A page of one file that tells what runs did and reached, made from their logs alone.

    famt report runs/mae-0 runs/mae-1 runs/famt-0 -o report.html

Loss, k-NN and probe against epochs and against training time, a table, where the time went, what
differs between the options, and the pictures of masks along the training. Runs whose options are
the same but for the seed are one row of the table and one colour. k-NN and probe stand in the log
of a run that had `--monitor`, or that `famt evaluate` looked at.
"""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from PIL import Image
from plotly.offline import get_plotlyjs

from famt.pipeline.errors import UserError
from famt.pipeline.options import FREE, annotated
from famt.train import history
from famt.train.config import Pretrain
from famt.train.evaluate.options import Finetune
from famt.train.history import Basis, Found, History
from famt.train.options import Report
from famt.train.program import parsed, run_program

METRICS = {
    "k-NN, class token": {"monitor": "knn_cls", "knn": "top1_cls"},
    "k-NN, mean of patches": {"monitor": "knn_mean", "knn": "top1_mean"},
    "Probe, class token": {"monitor": "probe_cls", "probe": "top1_cls"},
    "Probe, mean of patches": {"monitor": "probe_mean", "probe": "top1_mean"},
    "Probe, attentive pooling": {"probe": "top1_attentive"},
    "Segmentation, mean IoU": {"segment": "miou"},
}
"""What is drawn and compared -> by evaluator, the name of its value, in [0, 1]."""

_COLOURS = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b6b6b",
]  # fmt: skip
_DATA = "images trained on (digest)"
_STAGES = ["#264653", "#2a9d8f", "#8ab17d", "#e9c46a", "#f4a261", "#e76f51", "#8d6a9f"]
_PICTURES, _PICTURE_WIDTH = 6, 720  # of a run, and px


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        name: of all of them.
        runs: one at least.
        cost_per_step: what a step costs; None takes the time that the run itself logged.
    """

    name: str
    runs: list[History]
    cost_per_step: float | None = None

    @property
    def seeds(self) -> int:
        """How many different ones."""
        return len({run.options.get("seed") for run in self.runs})

    def cost(self, run: History, step: int) -> float:
        """Of a run until a step: steps times their cost, or seconds."""
        if self.cost_per_step is None:
            return run.seconds(step)
        return step * self.cost_per_step


def main(report: Report) -> Path:
    """Write the page; returns where it is. A run that can't be read is named on it.

    Raises:
        UserError: no folder is given, or none holds a run that has begun.
    """
    if not report.runs:
        raise UserError("give the folder of a run, or several")
    runs, notes = [], []
    for folder in dict.fromkeys(report.runs):
        try:
            run = history.read(folder)
        except (UserError, OSError) as error:
            notes.append(f"Left out: {error}")
            continue
        runs.append(run)
        if run.corrupt:
            notes.append(f"{folder / 'log.jsonl'}: {run.corrupt} line(s) can't be read")
    if not runs:
        raise UserError("; ".join(notes))
    write(report.out, gather(runs), "What the runs reached", notes=notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"{report.out}: {report.out.stat().st_size / 1e6:.1f} MB")
    return report.out


def gather(runs: Sequence[History]) -> list[Group]:
    """Put together runs that differ in their seeds alone, under what their names share."""
    alike: dict[str, list[History]] = {}
    for run in runs:
        alike.setdefault(json.dumps(_told(run), sort_keys=True), []).append(run)
    names = [_common_name(members) for members in alike.values()]
    if len(set(names)) < len(names):
        names = [str(members[0].folder) for members in alike.values()]
    return [Group(name, members) for name, members in zip(names, alike.values(), strict=True)]


def write(
    out: Path,
    groups: Sequence[Group],
    title: str,
    cost_title: str | None = None,
    introduction: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Write a page about runs.

    Args:
        out: HTML file; its folder is made.
        cost_title: what the cost of the groups is, if their steps have one.
        introduction: HTML that stands first.
        notes: what a reader must know of the runs.
    """
    scale, cost_title = (1.0, cost_title) if cost_title else _time_scale(groups)
    colours = {group.name: _COLOURS[n % len(_COLOURS)] for n, group in enumerate(groups)}
    curves = [
        (name, [_curves(groups, name, scale, title) for title in (None, cost_title)])
        for name in ("Loss", *METRICS)
    ]
    columns = _columns(groups)
    page = _template().render(
        title=title,
        introduction=introduction,
        colours=colours,
        curves=[(name, figures) for name, figures in curves if figures[0]["data"]],
        notes=notes,
        bases=list(dict.fromkeys((each.kind, each.basis.text) for each in columns)),
        header=["runs", "seeds", "epochs", cost_title, "loss", *(each.title for each in columns)],
        rows=[_row(group, columns, scale) for group in groups],
        few=min(group.seeds for group in groups) < 3,
        time=_time(groups),
        differences=_differences(groups),
        masks=[
            {
                "name": _run_name(run, group),
                "first": run is group.runs[0],
                "pictures": shown,
            }
            for group in groups
            for run in group.runs
            if (shown := _pictures(run))
        ],
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


def last(run: History, evaluator: str, value: str, basis: Basis | None = None) -> float | None:
    """The value that an evaluator found of the trained encoder at the latest step it looked at.

    Args:
        basis: that it was measured on; None takes any.
    """
    found = [each for each in _of(run, evaluator, value) if basis in (None, each.basis)]
    return float(max(reversed(found), key=lambda each: each.step).values[value]) if found else None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error over seeds; a single seed has no error."""
    if len(values) == 1:
        return values[0], None
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def percent(values: Sequence[float]) -> str:
    """Shares as `51.5 ± 0.2` percent, mean and standard error; `–` for none."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _curves(
    groups: Sequence[Group], metric: str, scale: float, cost_title: str | None
) -> dict[str, Any]:
    """A chart of a metric or the loss; against epochs, or against cost if it has a title."""
    traces: list[dict[str, Any]] = []

    def trace(
        n: int, run: History, steps: list[tuple[int, float]], ys: list[float], **look: Any
    ) -> None:
        group = groups[n]
        xs = [epoch if not cost_title else group.cost(run, step) / scale for step, epoch in steps]
        if ys:
            traces.append(
                {
                    "x": [float(f"{x:.5g}") for x in xs],
                    "y": [float(f"{y:.5g}") for y in ys],
                    "name": _label(run, group),
                    "line": {"color": _COLOURS[n % len(_COLOURS)], "width": 2},
                    "opacity": 0.85,
                    **look,
                }
            )

    for n, group in enumerate(groups):
        for run in group.runs:
            if metric == "Loss":
                steps = [(point.step, point.epoch) for point in run.points]
                trace(n, run, steps, [point.loss for point in run.points], mode="lines")
                continue
            for evaluator, value in METRICS[metric].items():
                for kind, basis in _bases(groups, evaluator).items():
                    found = [each for each in _of(run, evaluator, value) if each.basis == basis]
                    trace(
                        n,
                        run,
                        [(each.step, each.epoch) for each in found],
                        [100 * each.values[value] for each in found],
                        name=f"{_label(run, group)}, {kind}",
                        **_LOOKS["monitor" if evaluator == "monitor" else "evaluation"],
                    )
    return {
        "data": traces,
        "x": cost_title or "epochs",
        "y": "loss" if metric == "Loss" else "right, %",
    }


_LOOKS: dict[str, dict[str, Any]] = {
    "monitor": {"mode": "lines+markers", "marker": {"size": 5}},
    "evaluation": {
        "mode": "markers",
        "marker": {"size": 11, "symbol": "diamond", "line": {"color": "white", "width": 1}},
    },
}


def _of(run: History, evaluator: str, value: str) -> list[Found]:
    return [
        each
        for each in run.found
        if each.evaluator == evaluator and each.weights == "trained" and value in each.values
    ]


class _Column(NamedTuple):
    """A metric on a basis, such as the k-NN on certain images; `kind` is what a reader calls it."""

    metric: str
    evaluator: str
    value: str
    kind: str
    basis: Basis

    @property
    def title(self) -> str:
        return f"{self.metric} ({self.kind.rpartition(', ')[2]}, %)"

    def of(self, run: History) -> float | None:
        return last(run, self.evaluator, self.value, self.basis)


def _columns(groups: Sequence[Group]) -> list[_Column]:
    """Those that any run has a figure for."""
    columns = [
        _Column(metric, evaluator, value, kind, basis)
        for metric, places in METRICS.items()
        for evaluator, value in places.items()
        for kind, basis in _bases(groups, evaluator).items()
    ]
    runs = [run for group in groups for run in group.runs]
    return [each for each in columns if any(each.of(run) is not None for run in runs)]


def _bases(groups: Sequence[Group], evaluator: str) -> dict[str, Basis]:
    """What an evaluator's figures were measured on, by name: `knn, test`, or `knn, test 2`."""
    bases = dict.fromkeys(
        each.basis
        for group in groups
        for run in group.runs
        for each in run.found
        if each.evaluator == evaluator and each.weights == "trained"
    )
    name = evaluator if evaluator == "monitor" else f"{evaluator}, test"
    return {f"{name} {n}" if len(bases) > 1 else name: each for n, each in enumerate(bases, 1)}


def _row(group: Group, columns: Sequence[_Column], scale: float) -> list[str]:
    ends = [run.points[-1] for run in group.runs]
    costs = [group.cost(run, end.step) / scale for run, end in zip(group.runs, ends, strict=True)]
    figures = [
        [found for run in group.runs if (found := column.of(run)) is not None] for column in columns
    ]
    epochs = f"{min(end.epoch for end in ends):.4g}"
    unfinished = "" if all(run.finished for run in group.runs) else " (unfinished)"
    return [
        group.name,
        str(group.seeds),
        epochs + unfinished,
        f"{statistics.mean(costs):.3g}",
        f"{statistics.mean(end.loss for end in ends):.4f}",
        *(
            percent(each) + (f" (of {len(each)})" if 0 < len(each) < len(group.runs) else "")
            for each in figures
        ),
    ]


def _time(groups: Sequence[Group]) -> dict[str, Any]:
    """A bar for each run, parted by what its time was spent in."""
    runs = [(run, group) for group in reversed(groups) for run in reversed(group.runs)]
    stages = list(dict.fromkeys(stage for run, _ in runs for stage in run.stages))
    stages.sort(key=lambda stage: stage == history.NO_STAGE)
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": stage.replace("_", " "),
                "y": [_label(run, group) for run, group in runs],
                "x": [round(100 * run.stages.get(stage, 0.0), 2) for run, _ in runs],
                "marker": {"color": "#c9ced6" if stage == history.NO_STAGE else colour},
                "hovertemplate": "%{fullData.name}: %{x:.1f} %<extra>%{y}</extra>",
            }
            for stage, colour in zip(stages, itertools.cycle(_STAGES), strict=False)
        ],
        "x": "share of the training's time, %",
        "y": "",
        "height": 70 + 26 * len(runs),
    }


def _differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Options that the groups do not all have in common, each with its value in every group."""
    told = [_told(group.runs[0]) for group in groups]
    names = list(dict.fromkeys(name for each in told for name in each))
    return [
        (
            name if name == _DATA else "--" + name.replace("_", "-"),
            [_show(each.get(name)) for each in told],
        )
        for name in names
        if any(each.get(name) != told[0].get(name) for each in told)
    ]


def _pictures(run: History) -> list[dict[str, str]]:
    """Pictures of masks, small enough for a page."""
    shown = []
    for step, picture in history.pictures(run.folder, _PICTURES):
        if picture.width > _PICTURE_WIDTH:
            height = round(picture.height * _PICTURE_WIDTH / picture.width)
            picture = picture.resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=80)
        shown.append({"step": f"step {step}", "data": base64.b64encode(buffer.getvalue()).decode()})
    return shown


def _time_scale(groups: Sequence[Group]) -> tuple[float, str]:
    longest = max(run.points[-1].seconds for group in groups for run in group.runs)
    return next(
        (seconds, f"training time, {name}")
        for seconds, name, least in ((3600, "h", 10800), (60, "min", 180), (1, "s", 0))
        if longest >= least
    )


def _told(run: History) -> dict[str, Any]:
    """Options that make a run what it is, and what it trains on."""
    told = {name: value for name, value in run.options.items() if name not in _free()}
    return told if run.data is None else {**told, _DATA: run.data}


@cache
def _free() -> set[str]:
    """Options that nothing which is learned depends on, and the seed."""
    programs = (
        Pretrain(shards=[], cache="", out=Path()),
        Finetune(checkpoint="", cache="", train=[], val=[], out=Path()),
    )
    free = (name for each in programs for name, _, notes in annotated(each) if FREE in notes)
    return {"seed", *free}


def _common_name(runs: Sequence[History]) -> str:
    names = [run.folder.resolve().name for run in runs]
    if len(names) == 1:
        return names[0]
    shared = {re.sub(r"[-_.]*(seed)?[-_.]*\d+$", "", name) for name in names}
    return shared.pop() if len(shared) == 1 else " + ".join(names)


def _run_name(run: History, group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name}, seed {run.options.get('seed')}"


def _label(run: History, group: Group) -> str:
    """A run's name for Plotly, which takes `<` for the beginning of a tag."""
    return _run_name(run, group).replace("<", "&lt;")


def _show(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _template() -> Any:
    text = resources.files("train").joinpath("report.html").read_text()
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


if __name__ == "__main__":
    run_program(main, parsed(Report, __doc__))
