"""How every program starts and ends: command line, exit code, errors in one line."""

from __future__ import annotations

import ast
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import tyro

from famt.__main__ import Command, called
from famt.pipeline import storage
from famt.pipeline.errors import CacheError, RankError, UserError
from famt.train import config

Config = TypeVar("Config")

_STDOUT = 1  # its file descriptor
_NO_MEMORY = ("out of memory", "can't allocate memory")  # as torch puts it, on GPUs and on CPUs


def is_users(error: BaseException) -> bool:
    """Whether an error is the user's, such as wrong input; any other is a bug.

    Plain ValueErrors are bugs: broken contracts of functions, or errors out of libraries.
    """
    kinds = (UserError, CacheError, FloatingPointError, RankError, *storage.UNREACHABLE)
    return isinstance(error, kinds)


def parsed(kind: Any, description: str | None) -> Any:
    """Parse the command line into a program's options, a dataclass or a union of them."""
    with _ending():
        if isinstance(kind, type) and issubclass(kind, config.Pretrain):
            return config.parse(sys.argv[1:], description, kind)
        return tyro.cli(kind, prog=called(), description=description)


def run_command(command: Command) -> NoReturn:
    """Parse a command line, then import the program and run it."""
    source = Path(str(find_spec(command.path).origin))  # type: ignore[union-attr]
    about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    options = parsed(resolve_name(f"famt.{command.options}"), about)
    run_program(lambda each: resolve_name(f"{command.path}:main")(each), options)


def run_program(main: Callable[[Config], object], config: Config) -> NoReturn:
    """Run `main(config)` and exit with the code that it returns (0 if none), or 2 on an error.

    A user's error and Ctrl-C (exit code 130) print one line; any other error, its traceback. If
    the reader of the output is gone, as after `| head`, the program ends silently.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print names in any script to any terminal
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
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        message = storage.reason(error)
        if isinstance(error, RuntimeError) and any(each in message for each in _NO_MEMORY):
            message = (
                "not enough memory: lower --batch-size; in training, --accumulate and "
                f"--checkpoint-blocks save memory too ({message})"
            )
        elif not is_users(error):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe without a reader; if so, discards further output."""
    output = select.poll()
    output.register(_STDOUT, 0)  # errors are always reported
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True
