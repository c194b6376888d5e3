"""What holds for every program here, by its real command line."""

import dataclasses
import math
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path
from pkgutil import resolve_name

import pytest
import tyro
from annotated_types import Ge, Gt, Le, Lt

import famt.__main__
from famt.__main__ import COMMANDS
from famt.jobs.benchmark import BENCHMARKS
from famt.jobs.cache import Command
from famt.jobs.gpu_check import GpuCheck
from famt.jobs.options import RayPretrain
from famt.train.command_line import parsed
from famt.train.config import Pretrain
from famt.train.evaluate.evaluators import EVALUATORS

ROOT = Path(__file__).parents[1]

# The options of each command of each program.
PROGRAMS = {
    **{
        each.path: resolve_name(f"famt.{each.options}")
        for word, each in COMMANDS.items()
        if each.options and word not in ("evaluate", "recipes")
    },
    "famt.jobs.gpu_check": GpuCheck,
    "famt.train.pretrain": Pretrain,
    **{f"famt.jobs.benchmark {name}": kind for name, kind in BENCHMARKS.items()},
    **{f"famt.jobs.cache {each.__name__.lower()}": each for each in typing.get_args(Command)},
    **{f"famt.train.evaluate {name}": kind for name, kind in EVALUATORS.items()},
}


def _numbers(kind, above=""):
    """(name on the command line, whether whole, how many, notes) of every option of numbers."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        name = f"{above}{field.name}".replace("_", "-")
        notes = getattr(hints[field.name], "__metadata__", ())
        parts, inner = [], [hints[field.name]]
        while inner:
            part = inner.pop()
            parts.append(part)
            inner += [] if typing.get_origin(part) is typing.Literal else typing.get_args(part)
            inner += [part.__origin__] if hasattr(part, "__metadata__") else []
        for part in parts:
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _numbers(part, f"{name}.")
        if int in parts or float in parts:
            pair = any(typing.get_args(part) == (float, float) for part in parts)
            yield name, float not in parts, 2 if pair else 1, notes


def _beyond(notes):
    """A value on the wrong side of each bound."""
    for note in notes:
        match note:
            case Ge(ge=least):
                yield least - 1
            case Gt(gt=limit):
                yield limit
            case Le(le=most):
                yield most + 1
            case Lt(lt=limit):
                yield limit


def test_every_program_is_looked_at():
    files = [
        path for package in ("jobs", "train", "pipeline") for path in (ROOT / package).rglob("*.py")
    ]
    programs = {
        ".".join(("famt", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__main__")
        for path in files
        if "run_program(" in path.read_text() and path.name != "command_line.py"
    }
    assert programs == {name.partition(" ")[0] for name in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_that_is_a_number_has_a_bound_beside_it(program):
    bounds = (Ge, Gt, Le, Lt)
    free = [
        name
        for name, _, _, notes in _numbers(PROGRAMS[program])
        if not any(isinstance(note, bounds) for note in notes)
    ]
    assert not free, f"state bounds as pipeline/options.py says: {', '.join(free)}"


def test_command_lines_are_parsed_before_anything_heavy_is_imported():
    code = """
import sys
from pkgutil import resolve_name
import famt.train.command_line
for options in sys.argv[1:]:
    resolve_name(options)
print(*{name.partition(".")[0] for name in sys.modules})
"""
    options = [f"famt.{each.options}" for each in COMMANDS.values() if each.options]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "timm", "nvidia", "ray", "zarr", "sklearn"} & {*done.stdout.split()}


def test_help_shows_the_options_that_matter_and_help_all_the_others(capsys, monkeypatch):
    shown = {}
    for asked in ("--help", "--help-all"):
        monkeypatch.setattr("sys.argv", ["famt pretrain", asked])
        with pytest.raises(SystemExit):
            parsed(RayPretrain, "Train.")
        found = re.findall(r"(?m)^\W*--([a-z][a-z.-]+)", capsys.readouterr().out)
        shown[asked] = {*found} - {"help-all"}
    assert len(shown["--help"]) == 15
    assert {"data", "shards", "out", "model", "workers"} < shown["--help"] < shown["--help-all"]
    assert "join.mask-ratio" in shown["--help-all"]


_LONG = (
    "famt.jobs.pretrain",
    "famt.train.pretrain",
    "famt.train.evaluate finetune",
)  # of some 60 options


@pytest.mark.parametrize(
    "program",
    [pytest.param(each, marks=pytest.mark.slow if each in _LONG else ()) for each in PROGRAMS],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_number_out_of_bounds_ends_a_program_with_2_and_is_named(program, monkeypatch, capsys):
    module, _, command = program.partition(" ")
    monkeypatch.chdir(ROOT)
    for name, whole, count, notes in _numbers(PROGRAMS[program]):
        for value in [*_beyond(notes), *([] if whole else [math.nan])]:
            arguments = [*command.split(), *_required(PROGRAMS[program]), f"--{name}"]
            monkeypatch.setattr("sys.argv", [module, *arguments, *count * [str(value)]])
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
            assert ended.value.code == 2, (name, value)
            assert f"{name.rpartition('.')[2]} {value}" in shown, (name, value, shown)


def _required(kind):
    """The options that have no default, with something."""
    hints = typing.get_type_hints(kind, include_extras=True)
    given = []
    for field in dataclasses.fields(kind):
        if (field.default, field.default_factory) == (dataclasses.MISSING, dataclasses.MISSING):
            values = typing.get_args(hints[field.name])
            is_choice = typing.get_origin(hints[field.name]) is typing.Literal
            positional = tyro.conf.Positional[int].__metadata__[0] in getattr(
                hints[field.name], "__metadata__", ()
            )
            name = [] if positional else [f"--{field.name.replace('_', '-')}"]
            given += [*name, str(values[0]) if is_choice else "nothing"]
    return given


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["pretain"], "'pretain', did you mean pretrain? `famt --help`"),
        (["zzz"], "'zzz'; `famt --help`"),
        (["evaluate", "knnn", "--checkpoint", "c"], "'knnn', did you mean knn? `famt evaluate"),
    ],
)
def test_a_word_that_is_no_command_is_refused_with_the_one_that_is_like_it(
    words, hint, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["famt", *words])
    with pytest.raises(SystemExit) as ended:
        famt.__main__.main()
    assert ended.value.code == 2
    assert f"error: no command {hint}" in capsys.readouterr().err
