"""A page of one file that tells what runs did and reached, made from their logs alone.

    famt report runs/mae-0 runs/mae-1 runs/famt-0 -o report.html

A sentence on what each run is and reached, a table, loss, k-NN and probe against epochs and against
training time, where the time went, the options of a single run or what differs between several, and
the pictures of masks along the training. Runs whose options are the same but for the seed are one
row of the table and one colour, with their mean and standard error. k-NN and probe are in the log
of a run that had `--monitor`, or that `famt evaluate` looked at; `famt evaluate --untrained` adds
the floor.
"""

from __future__ import annotations

import base64
import dataclasses
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
from famt.pipeline.options import FREE, annotated, flat
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
    notes: Sequence[str] = (),
) -> None:
    """Write a page about runs.

    Args:
        out: HTML file; its folder is made.
        cost_title: what the cost of the groups is, if their steps have one.
        notes: what a reader must know of the runs.
    """
    scale, cost_title = (1.0, cost_title) if cost_title else _time_scale(groups)
    colours = {group.name: _COLOURS[n % len(_COLOURS)] for n, group in enumerate(groups)}
    columns = _columns(groups)
    curves = [
        (name, [_curves(groups, name, columns, scale, title) for title in (None, cost_title)])
        for name in ("Loss", *METRICS)
    ]
    floors = [_floor(group, columns) for group in groups]
    page = _template().render(
        title=title,
        headlines=[_headline(group, columns) for group in groups],
        colours=colours,
        curves=[(name, figures) for name, figures in curves if figures[0]["data"]],
        notes=notes,
        bases=list(dict.fromkeys((each.kind, each.basis.text) for each in columns)),
        header=["runs", "seeds", "epochs", cost_title, "loss", *(each.title for each in columns)],
        rows=[*(_row(group, columns, scale) for group in groups), *filter(None, floors)],
        few=sum(len(group.runs) for group in groups) > 1 and min(each.seeds for each in groups) < 3,
        time=_time(groups),
        options=_differences(groups) if len(groups) > 1 else _changed(groups[0]),
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


def last(
    run: History,
    evaluator: str,
    value: str,
    basis: Basis | None = None,
    weights: str = "trained",
) -> float | None:
    """The value that an evaluator found of an encoder at the latest step it looked at.

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
    groups: Sequence[Group],
    metric: str,
    columns: Sequence[_Column],
    scale: float,
    cost_title: str | None,
) -> dict[str, Any]:
    """A chart of a metric or the loss; against epochs, or against cost if it has a title."""
    traces: list[dict[str, Any]] = []
    for group, colour in zip(groups, itertools.cycle(_COLOURS), strict=False):

        def x(run: History, step: int, epoch: float, group: Group = group) -> float:
            return group.cost(run, step) / scale if cost_title else epoch

        line = {"line": {"color": colour, "width": 2}, "opacity": 0.85}
        if metric == "Loss":
            for run in group.runs:
                points = [(x(run, each.step, each.epoch), each.loss) for each in run.points]
                traces.append(
                    {"name": _label(run, group), "mode": "lines", **_rounded(points), **line}
                )
        for column in columns:
            seeds: dict[int, list[tuple[float, float]]] = {}  # step -> x and value of each seed
            for run in group.runs if column.metric == metric else ():
                for each in run.found:
                    if column.holds(each):
                        at = x(run, each.step, each.epoch), 100 * each.values[column.value]
                        seeds.setdefault(each.step, []).append(at)
            if not seeds:
                continue
            means = [
                tuple(statistics.mean(each) for each in zip(*at, strict=True))
                for _, at in sorted(seeds.items())
            ]
            errors = [mean_and_error([y for _, y in at])[1] or 0 for _, at in sorted(seeds.items())]
            look = _LOOKS["monitor" if column.evaluator == "monitor" else "evaluation"]
            trace = {"name": f"{_escaped(group.name)}, {column.kind}", **_rounded(means), **look}
            if any(errors):
                bars = [round(each, 3) for each in errors]
                trace["error_y"] = {"type": "data", "array": bars, "thickness": 1.2}
            traces.append({**trace, **line})
    return {
        "data": traces,
        "x": cost_title or "epochs",
        "y": "loss" if metric == "Loss" else "right, %",
    }


def _rounded(points: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    """Coordinates of a trace to five digits, for a small page."""
    return {name: [float(f"{each[n]:.5g}") for each in points] for n, name in enumerate("xy")}


_LOOKS: dict[str, dict[str, Any]] = {
    "monitor": {"mode": "lines+markers", "marker": {"size": 5}},
    "evaluation": {
        "mode": "markers",
        "marker": {"size": 11, "symbol": "diamond", "line": {"color": "white", "width": 1}},
    },
}


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

    def of(self, run: History, weights: str = "trained") -> float | None:
        return last(run, self.evaluator, self.value, self.basis, weights)

    def of_all(self, group: Group, weights: str = "trained") -> list[float]:
        return [each for run in group.runs if (each := self.of(run, weights)) is not None]

    def holds(self, found: Found) -> bool:
        place = found.evaluator, found.weights, found.basis
        return place == (self.evaluator, "trained", self.basis) and self.value in found.values


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
            for each in (column.of_all(group) for column in columns)
        ),
    ]


def _floor(group: Group, columns: Sequence[_Column]) -> list[str] | None:
    """The row of a group's encoder with random weights, if it was evaluated."""
    figures = [column.of_all(group, "untrained") for column in columns]
    if not any(figures):
        return None
    seeds = str(max(map(len, figures)))
    return [f"{group.name}, untrained", seeds, *["–"] * 3, *map(percent, figures)]


def _headline(group: Group, columns: Sequence[_Column]) -> dict[str, str]:
    """What runs are, on what data, what they reached, in what time, and whether they are done."""
    run = group.runs[0]
    model, recipe = (_option(run, name) for name in ("model", "recipe"))
    what = ", ".join(str(each) for each in (model, recipe and f"recipe {recipe}") if each)
    shards = _option(run, "shards") or _option(run, "train") or []
    data = f"{run.images:,} images" + (f" of {' '.join(shards)}" if shards else "")
    reached = f"loss {statistics.mean(each.points[-1].loss for each in group.runs):.4f}"
    # Probes last in METRICS say most; what an evaluation found, more than the monitor.
    told = [each for each in columns if each.of_all(group) and each.metric.startswith("Probe")]
    for column in sorted(told or [each for each in columns if each.of_all(group)], key=_weight)[
        -1:
    ]:
        reached = f"{percent(column.of_all(group))} % by {column.title.rpartition(',')[0]})"
        if floor := column.of_all(group, "untrained"):
            reached += f", untrained {percent(floor)} %"
    epoch, epochs = min(each.points[-1].epoch for each in group.runs), _option(run, "epochs")
    seconds = statistics.mean(each.points[-1].seconds for each in group.runs)
    unit, name = next((unit, name) for unit, name, least in _UNITS if seconds >= least)
    done = all(each.finished for each in group.runs)
    state = "finished" if done else f"not finished, {epochs} epochs are planned"
    time = f"{epoch:.4g} epochs in {seconds / unit:.3g} {name}"
    seeds = f", {group.seeds} seeds" if group.seeds > 1 else ""
    return {"name": group.name, "text": f"({what}{seeds}) on {data}: {reached}; {time}, {state}."}


def _weight(column: _Column) -> tuple[bool, int]:
    return column.evaluator != "monitor", list(METRICS).index(column.metric)


def _option(run: History, name: str) -> Any:
    """An option by its own name, whatever section it is in."""
    return next((v for each, v in run.options.items() if each.rpartition(".")[2] == name), None)


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


def _changed(group: Group) -> list[tuple[str, list[str]]]:
    """Model and recipe of a run, and its options that are not the defaults."""
    run = group.runs[0]
    program = _programs()["checkpoint" in run.options]
    plain = json.loads(json.dumps(dataclasses.asdict(program), default=str))
    defaults = {"model": None, "recipe": None} | {
        name: value for name, value in flat(plain).items() if name not in ("model", "recipe")
    }
    return [
        ("--" + name.replace("_", "-"), [_show(run.options[name])])
        for name, default in defaults.items()
        if name in run.options and run.options[name] != default
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


_UNITS = (3600, "h", 10800), (60, "min", 180), (1, "s", 0)  # seconds, name, least seconds


def _time_scale(groups: Sequence[Group]) -> tuple[float, str]:
    longest = max(run.points[-1].seconds for group in groups for run in group.runs)
    return next(
        (unit, f"training time, {name}") for unit, name, least in _UNITS if longest >= least
    )


def _told(run: History) -> dict[str, Any]:
    """Options that make a run what it is, and what it trains on."""
    told = {name: value for name, value in run.options.items() if name not in _free()}
    return told if run.data is None else {**told, _DATA: run.data}


@cache
def _free() -> set[str]:
    """Options that nothing which is learned depends on, and the seed."""
    free = (name for each in _programs() for name, _, notes in annotated(each) if FREE in notes)
    return {"seed", *free}


def _programs() -> tuple[Pretrain, Finetune]:
    """Both kinds of training, with their default options."""
    return (
        Pretrain(shards=[], cache="", out=Path()),
        Finetune(checkpoint="", cache="", train=[], val=[], out=Path()),
    )


def _common_name(runs: Sequence[History]) -> str:
    names = [run.folder.resolve().name for run in runs]
    if len(names) == 1:
        return names[0]
    shared = {re.sub(r"[-_.]*(seed)?[-_.]*\d+$", "", name) for name in names}
    return shared.pop() if len(shared) == 1 else " + ".join(names)


def _run_name(run: History, group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name}, seed {run.options.get('seed')}"


def _label(run: History, group: Group) -> str:
    return _escaped(_run_name(run, group))


def _escaped(name: str) -> str:
    """A name for Plotly, which takes `<` for the beginning of a tag."""
    return name.replace("<", "&lt;")


def _show(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _template() -> Any:
    text = resources.files("train").joinpath("report.html").read_text()
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


if __name__ == "__main__":
    run_program(main, parsed(Report, __doc__))
