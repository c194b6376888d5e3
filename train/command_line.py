"""How every program starts and ends: command line, exit code, errors in one line."""

from __future__ import annotations

import ast
import atexit
import dataclasses
import gc
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro

from famt.__main__ import Command, called, unknown
from famt.pipeline import storage
from famt.pipeline.errors import CacheError, RankError, UserError
from famt.pipeline.options import MAIN, notes_of
from famt.train import recipe
from famt.train.config import REQUIRED, Pretrain

Config = TypeVar("Config")
Options = TypeVar("Options", bound=Pretrain)

_HOME = re.compile(r"(?:^|(?<==))~(?=/|$)")
_STDOUT = 1  # its file descriptor
_NO_MEMORY = ("out of memory", "can't allocate memory")  # as torch puts it, on GPUs and on CPUs


def is_users(error: BaseException) -> bool:
    """Whether an error is the user's, such as wrong input; any other is a bug.

    Plain ValueErrors are bugs: broken contracts of functions, or errors out of libraries.
    """
    kinds = (UserError, CacheError, FloatingPointError, RankError, *storage.UNREACHABLE)
    return isinstance(error, kinds)


def parsed(kind: Any, description: str | None) -> Any:
    """Parse the command line into a program's options, a dataclass or a union of them.

    `~` is the home folder also where shells leave it alone: in `--out=~/run` and in quotes.
    """
    arguments = [_HOME.sub(lambda _: os.path.expanduser("~"), each) for each in sys.argv[1:]]
    with _ending():
        if isinstance(kind, type) and issubclass(kind, Pretrain):
            return parse(arguments, description, kind)
        words = [each.__name__.lower() for each in get_args(kind)]
        given = arguments[0] if arguments else "-"
        if words and not given.startswith("-") and given not in words:
            raise UserError(f"{unknown(given, words)} `{called()} --help` lists them")
        return tyro.cli(kind, prog=called(), args=arguments, description=description)


def parse(
    arguments: list[str],
    description: str | None,
    program: type[Options] = Pretrain,  # type: ignore[assignment]
) -> Options:
    """Parse a command line; `--recipe` is read first, as it sets the other options' defaults.

    Raises:
        UserError: the recipe does not exist, or its file is wrong; names the file.
    """
    name = recipe.DEFAULT
    for position, argument in enumerate(arguments):
        if argument == "--recipe" and position + 1 < len(arguments):
            name = arguments[position + 1]
        elif argument.startswith("--recipe="):
            name = argument.partition("=")[2]
    default = resolve(recipe.load(name), program)
    missing = [
        each.name
        for each in dataclasses.fields(program)
        if each.default is each.default_factory is dataclasses.MISSING
        and getattr(default, each.name) == REQUIRED[each.name]
    ]
    default = dataclasses.replace(default, recipe=name, **dict.fromkeys(missing, tyro.MISSING))
    about = f"{description or ''}\nRecipes:\n\n{recipe.overview()}"
    if {"-h", "--help"} & {*arguments}:
        short = _short(program)
        default = short(**vars(default))
        about = "\n\n".join((description or "").split("\n\n")[:2])
        about += f"\n\nRecipes: {', '.join(recipe.names())}\n\n--help-all shows all options."
        return tyro.cli(short, prog=called(), args=arguments, default=default, description=about)
    arguments = ["--help" if each == "--help-all" else each for each in arguments]
    try:
        arguments = program.with_suggestions(arguments, default)
        return tyro.cli(program, prog=called(), args=arguments, default=default, description=about)
    except SystemExit as ended:
        if ended.code:  # tyro's own hint is at --help
            print(f"`{called()} --help-all` shows all options", file=sys.stderr)
        raise


def _short(program: type[Options]) -> type[Options]:
    """The same options; the help shows only those noted `MAIN`."""
    hints = get_type_hints(program, include_extras=True)
    hidden = [
        (each.name, Annotated[hints[each.name], tyro.conf.Suppress], each)
        for each in dataclasses.fields(program)
        if MAIN not in notes_of(program)[each.name]
    ]
    return dataclasses.make_dataclass(program.__name__, hidden, bases=(program,), frozen=True)


def resolve(each: recipe.Recipe, program: type[Options]) -> Options:
    """A program's options as a recipe and those that it extends set them."""
    default = resolve(each.extends, program) if each.extends else program(**REQUIRED)
    with naming(str(each.path)):
        return tyro.cli(program, args=each.options, default=default)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Name the place of the options that are parsed inside, if they are wrong.

    Raises:
        UserError: they are.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except SystemExit:  # tyro has printed which option is wrong, and why
        raise UserError(f"{place}: wrong options, see above") from None


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
    atexit.register(gc.freeze)  # else Python examines all objects of torch as it ends: seconds
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
