"""One self-contained HTML page about runs, made from their logs.

    famt report runs/mae-0 runs/mae-1 runs/famt-0 -o report.html

It has a sentence on each run, a table of results, curves of loss, k-NN and probe over epochs and
over training time, the share of time of each stage, options (the changed ones of a single run, or
those that differ between several), and pictures of masks. Runs that differ only in their seeds
share a table row and a colour, with mean and standard error. k-NN and probe need runs with
`--monitor` or an evaluation by `famt evaluate`; `famt evaluate --untrained` adds the floor.
"""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image
from plotly.offline import get_plotlyjs

from famt.pipeline.errors import UserError
from famt.pipeline.options import flat
from famt.pipeline.wording import counted
from famt.train import run_log
from famt.train.command_line import parsed, resolve, run_program
from famt.train.comparison import (
    DATA,
    METRICS,
    Column,
    Group,
    columns_of,
    default_options,
    gather,
    identity,
    mean_and_error,
    percent,
)
from famt.train.config import Pretrain, TrainingOptions
from famt.train.program_options import Report
from famt.train.recipe import DEFAULT, load
from famt.train.run_log import History

_COLOURS = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b6b6b",
]  # fmt: skip
_STAGES = ["#264653", "#2a9d8f", "#8ab17d", "#e9c46a", "#f4a261", "#e76f51", "#8d6a9f"]
_UNITS = (3600, "h", 10800), (60, "min", 180), (1, "s", 0)  # seconds, name, least seconds
_PICTURES, _PICTURE_WIDTH = 6, 720  # per run, and px
_LOOKS: dict[bool, dict[str, Any]] = {
    True: {"mode": "lines+markers", "marker": {"size": 7}},  # the monitor
    False: {
        "mode": "markers",
        "marker": {"size": 11, "symbol": "diamond", "line": {"color": "white", "width": 1}},
    },
}


def main(report: Report) -> Path:
    """Write the page and return its path; runs that can't be read are named on it.

    Raises:
        UserError: no folder is given, or none holds a run with a log point.
    """
    if not report.runs:
        raise UserError("give the folders of one or more runs")
    runs, notes = [], []
    for folder in dict.fromkeys(report.runs):
        try:
            run = run_log.read(folder)
        except (UserError, OSError) as error:
            notes.append(f"Left out: {error}")
            continue
        runs.append(run)
        if run.corrupt:
            notes.append(f"{folder / 'log.jsonl'}: unreadable: {counted(run.corrupt, 'line')}")
    if not runs:
        raise UserError("; ".join(notes))
    write(report.out, gather(runs), "Results of the runs", notes=notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    print(f"{report.out}: {report.out.stat().st_size / 1e6:.1f} MB")
    return report.out


def write(
    out: Path,
    groups: Sequence[Group],
    title: str,
    cost_title: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write a page about runs.

    Args:
        out: HTML file; its folder is created.
        cost_title: name and unit of the groups' costs; None if the groups only have times.
        notes: remarks on the runs.
    """
    scale = 1.0
    if cost_title is None:
        scale, unit = _unit(max(end.seconds for group in groups for end in group.ends))
        cost_title = f"training time, {unit}"
    columns = columns_of(groups)
    charts = {
        name: [_chart(groups, name, columns, scale, title) for title in (None, cost_title)]
        for name in ("Loss", *METRICS)
    }
    floors = (_floor(group, columns) for group in groups)
    page = _template().render(
        title=title,
        headlines=[(group.name, _headline(group, columns)) for group in groups],
        colours={
            each.name: colour
            for each, colour in zip(groups, itertools.cycle(_COLOURS), strict=False)
        },
        curves=[(name, pair) for name, pair in charts.items() if pair[0]["data"]],
        notes=notes,
        bases=list(dict.fromkeys((each.kind, each.basis.text) for each in columns)),
        header=["runs", "seeds", "epochs", cost_title, "loss", *(each.title for each in columns)],
        rows=[*(_row(group, columns, scale) for group in groups), *filter(None, floors)],
        few=sum(len(group.runs) for group in groups) > 1 and min(each.seeds for each in groups) < 3,
        time=[(group.label(run), run.stages) for group in groups for run in group.runs],
        stages=_stages(groups),
        options=_differences(groups) if len(groups) > 1 else _changed(groups[0].runs[0]),
        masks=[
            (group.label(run), run is group.runs[0], run.total_steps, shown)
            for group in groups
            for run in group.runs
            if (shown := _pictures(run))
        ],
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


def _chart(
    groups: Sequence[Group],
    metric: str,
    columns: Sequence[Column],
    scale: float,
    cost_title: str | None,
) -> dict[str, Any]:
    """A chart of a metric or the loss, over epochs, or over cost if it has a title."""
    traces: list[dict[str, Any]] = []
    for group, colour in zip(groups, itertools.cycle(_COLOURS), strict=False):

        def x(run: History, step: int, epoch: float, group: Group = group) -> float:
            return group.cost(run, step) / scale if cost_title else epoch

        line = {"line": {"color": colour, "width": 2}, "opacity": 0.85}
        for run in group.runs if metric == "Loss" else ():
            points = [(x(run, each.step, each.epoch), each.loss) for each in run.points]
            name = _escaped(group.label(run))
            traces.append({"name": name, "mode": "lines", **_rounded(points), **line})
        for column in (each for each in columns if each.metric == metric):
            seeds: dict[int, list[tuple[float, float]]] = {}  # step -> x and value of each seed
            for run in group.runs:
                for each in filter(column.holds, run.found):
                    at = x(run, each.step, each.epoch), 100 * each.values[column.value]
                    seeds.setdefault(each.step, []).append(at)
            if not seeds:
                continue
            points = [
                (statistics.mean(x for x, _ in at), statistics.mean(y for _, y in at))
                for _, at in sorted(seeds.items())
            ]
            errors = [mean_and_error([y for _, y in at])[1] or 0 for _, at in sorted(seeds.items())]
            look = _LOOKS[column.evaluator == "monitor"]
            trace = {"name": f"{_escaped(group.name)}, {column.kind}", **_rounded(points), **look}
            if any(errors):
                bars = [round(each, 3) for each in errors]
                trace["error_y"] = {"type": "data", "array": bars, "thickness": 1.2}
            traces.append({**trace, **line})
    y = "loss" if metric == "Loss" else "correct, %"
    return {"data": traces, "x": cost_title or "epochs", "y": y}


def _rounded(points: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """Coordinates of a trace, with five digits to keep the page small."""
    return {name: [float(f"{each[n]:.5g}") for each in points] for n, name in enumerate("xy")}


def _row(group: Group, columns: Sequence[Column], scale: float) -> list[str]:
    costs = [group.cost(run, run.points[-1].step) / scale for run in group.runs]
    unfinished = "" if all(run.finished for run in group.runs) else " (unfinished)"
    return [
        group.name,
        str(group.seeds),
        f"{min(end.epoch for end in group.ends):.4g}{unfinished}",
        f"{statistics.mean(costs):.3g}",
        f"{group.loss:.4f}",
        *(
            percent(each) + (f" (of {len(each)})" if 0 < len(each) < len(group.runs) else "")
            for each in (column.of(group) for column in columns)
        ),
    ]


def _floor(group: Group, columns: Sequence[Column]) -> list[str] | None:
    """The row of a group's untrained encoder, if it was evaluated."""
    values = [column.of(group, "untrained") for column in columns]
    if not any(values):
        return None
    seeds = str(max(map(len, values)))
    return [f"{group.name}, untrained", seeds, *["–"] * 3, *map(percent, values)]


def _headline(group: Group, columns: Sequence[Column]) -> str:
    """Model, data, best result, time and state of runs, in a sentence."""
    run = group.runs[0]
    model, recipe = (_option(run, name) for name in ("model", "recipe"))
    what = ", ".join(str(each) for each in (model, recipe and f"recipe {recipe}") if each)
    seeds = f", {group.seeds} seeds" if group.seeds > 1 else ""
    shards = _option(run, "shards") or _option(run, "train") or []
    data = run_log.images_of(run.images, shards)
    result = f"loss {group.loss:.4f}"
    measured = [each for each in columns if each.of(group)]
    if measured:
        best = max(measured, key=lambda each: each.weight)
        result = f"{best.metric} {percent(best.of(group))} % right on {best.basis.tested}"
        if floor := best.of(group, "untrained"):
            result += f", untrained {percent(floor)} %"
    seconds = statistics.mean(end.seconds for end in group.ends)
    scale, unit = _unit(seconds)
    epochs, done = _option(run, "epochs"), all(each.finished for each in group.runs)
    state = "finished" if done else f"not finished, {epochs} epochs are planned"
    time = f"{min(end.epoch for end in group.ends):.4g} epochs in {seconds / scale:.3g} {unit}"
    return f"({what}{seeds}), trained on {data}: {result}; {time}, {state}."


def _option(run: History, name: str) -> Any:
    """An option by its last name, in any group."""
    return next((v for each, v in run.options.items() if each.rpartition(".")[2] == name), None)


def _stages(groups: Sequence[Group]) -> dict[str, str]:
    """Stages of all runs, each with a colour; unmeasured time last, in grey."""
    names = dict.fromkeys(each for group in groups for run in group.runs for each in run.stages)
    names.pop(run_log.NO_STAGE)
    colours = dict(zip(names, itertools.cycle(_STAGES), strict=False))
    return {**colours, run_log.NO_STAGE: "#c9ced6"}


def _differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Options that differ between groups, each with its values."""
    each_has = [identity(group.runs[0]) for group in groups]
    names = dict.fromkeys(name for options in each_has for name in options)
    rows = [(name, [options.get(name) for options in each_has]) for name in names]
    return [
        (name if name == DATA else _flag(name), list(map(_show, values)))
        for name, values in rows
        if any(value != values[0] for value in values)
    ]


def _changed(run: History) -> list[tuple[str, list[str]]]:
    """Model and recipe of a run, and its options that differ from those of the default recipe."""
    if "checkpoint" in run.options:
        kind: TrainingOptions = default_options()[1]
    else:
        kind = resolve(load(DEFAULT), Pretrain)
    defaults = flat(kind.describe())
    named = [name for name in ("model", "recipe") if name in run.options]
    changed = [
        name
        for name, default in defaults.items()
        if name in run.options and run.options[name] != default
    ]
    return [(_flag(name), [_show(run.options[name])]) for name in dict.fromkeys(named + changed)]


def _pictures(run: History) -> list[tuple[int, str]]:
    """Step and content (WebP, base64) of the run's pictures of masks."""
    shown = []
    for step, picture in run_log.pictures(run.folder, _PICTURES):
        picture.thumbnail((_PICTURE_WIDTH, picture.height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=80)
        shown.append((step, base64.b64encode(buffer.getvalue()).decode()))
    return shown


def _unit(seconds: float) -> tuple[int, str]:
    """Length in seconds and name of the unit that suits a time."""
    return next((unit, name) for unit, name, least in _UNITS if seconds >= least)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _escaped(name: str) -> str:
    """A name for Plotly, which reads tags."""
    return name.replace("<", "&lt;")


def _show(value: Any) -> str:
    if isinstance(value, list) and value:
        return " ".join(map(_show, value))
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _template() -> Any:
    text = resources.files("famt.train").joinpath("report.html").read_text()
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)


if __name__ == "__main__":
    run_program(main, parsed(Report, __doc__))
