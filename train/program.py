"""How every program is called, and how it ends: exit code, and errors that a user can act on."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from pipeline import storage
from pipeline.manifest import CacheError
from train.lifeline import RankError

Config = TypeVar("Config")

_ROOT = Path(__file__).parents[1]
_ROOMS = tuple(_ROOT / room for room in ("famt", "pipeline", "train", "jobs"))


def is_users(error: BaseException) -> bool:
    """Whether a message says what is wrong with the input; anything else is a defect of a program.

    A ValueError is meant for users where a `raise` of this project's own made it. Libraries raise
    the same kind at wrong arguments, and so does Python (`int("x")`, an unpacking of too few).
    """
    if isinstance(error, (CacheError, FloatingPointError, RankError, *storage.UNREACHABLE)):
        return True
    return isinstance(error, ValueError) and _raised_here(error)


def called() -> str:
    """How the program that runs is called on a command line: `python -m train.report`, say."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:  # by its path
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run_program(main: Callable[[Config], object], config: Config) -> NoReturn:
    """Run `main(config)` and exit with the code that it returns (0 if none), or 2 on an error.

    An error that a user can act on is one line; of any other the traceback is shown.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of any script, on any terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        result = main(config)
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {storage.reason(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(result if type(result) is int else 0)


def _raised_here(error: BaseException) -> bool:
    steps = traceback.extract_tb(error.__traceback__)
    if not steps:
        return False
    file, line = Path(steps[-1].filename), steps[-1].line or ""
    return line.startswith("raise ") and any(file.is_relative_to(room) for room in _ROOMS)
