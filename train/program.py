"""How every program of this project ends: its exit code, and errors that a user can act on."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from pipeline import storage
from pipeline.manifest import CacheError
from train.lifeline import RankError

Config = TypeVar("Config")

# What wrong input raises: its message says what is wrong and what to do. Anything else is a defect
# of the program, and shows where.
USERS = (CacheError, FloatingPointError, RankError, ValueError, *storage.UNREACHABLE)


def run_program(main: Callable[[Config], object], config: Config) -> NoReturn:
    """Run `main(config)` and exit with the code that it returns (0 if none), or 2 on an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of any script, on any terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        result = main(config)
    except USERS as error:
        print(f"error: {storage.reason(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(result if type(result) is int else 0)
