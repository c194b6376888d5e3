"""How every program is called, and how it ends: exit code, and errors that a user can act on."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import tyro

from famt.__main__ import COMMANDS
from famt.pipeline import storage
from famt.pipeline.errors import CacheError, UserError
from famt.train.lifeline import RankError

Config = TypeVar("Config")

_STDOUT = 1  # its file descriptor


def is_users(error: BaseException) -> bool:
    """Whether a message says what is wrong with the input; anything else is a defect of a program.

    Plain ValueErrors are defects: contracts of functions, and what libraries and Python raise.
    """
    kinds = (UserError, CacheError, FloatingPointError, RankError, *storage.UNREACHABLE)
    return isinstance(error, kinds)


def called() -> str:
    """How the program that runs is called on a command line: `famt report`, say."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:  # by its path
        return f"python {sys.argv[0]}"
    name = spec.name.removesuffix(".__main__")
    return next(
        (f"famt {word}" for word, (module, _) in COMMANDS.items() if module == name),
        f"python -m {name}",
    )


def parsed(kind: Any, description: str | None) -> Any:
    """The options of a program, a dataclass or a union of them, as its command line gives them."""
    with _ending():
        return tyro.cli(kind, prog=called(), description=description)


def run_program(main: Callable[[Config], object], config: Config) -> NoReturn:
    """Run `main(config)` and exit with the code that it returns (0 if none), or 2 on an error.

    An error that a user can act on is one line, and so is Ctrl-C (exit code 130); of any other
    error the traceback is shown. Where nobody reads what is printed any more, as after `| head`,
    the program ends without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of any script, on any terminal
            stream.reconfigure(errors="backslashreplace")
    with _ending():
        result = main(config)
    sys.exit(result if type(result) is int else 0)


@contextmanager
def _ending() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # a second one does not wait for what ends here
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        if not is_users(error):
            raise
        print(f"error: {storage.reason(error)}", file=sys.stderr)
        sys.exit(2)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe with no reader; what is still to be shown goes nowhere."""
    output = select.poll()
    output.register(_STDOUT, 0)  # errors are told without being asked for
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True
