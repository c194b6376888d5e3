"""How every program is called, and how it ends: exit code, and errors that a user can act on."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from pipeline import storage
from pipeline.errors import UserError
from pipeline.manifest import CacheError
from train.lifeline import RankError

Config = TypeVar("Config")


def is_users(error: BaseException) -> bool:
    """Whether a message says what is wrong with the input; anything else is a defect of a program.

    Plain ValueErrors are defects: contracts of functions, and what libraries and Python raise.
    """
    kinds = (UserError, CacheError, FloatingPointError, RankError, *storage.UNREACHABLE)
    return isinstance(error, kinds)


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
