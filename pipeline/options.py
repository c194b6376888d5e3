"""Bounds of options, stated beside each option, and checked in one place for every program.

    epochs: Annotated[int, Ge(1)] = 800
    flip: Annotated[float, Ge(0), Le(1)] = 0.5

The bounds are those of the `annotated-types` package: `Ge`, `Gt`, `Le`, `Lt`, and `MinLen` for an
option of several values.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from famt.pipeline.errors import UserError

Options = TypeVar("Options")

FREE = "may differ on resume"
"""note beside an option of a run: nothing that is learned depends on it"""
ELASTIC = "may differ on resume with --elastic"
"""note beside an option of a run: it may, from the beginning of an epoch"""


PLACE = "a path or URL"
"""note beside an option: it is written down so that it holds in any working directory"""

Seed = Annotated[int, Ge(0), Lt(2**32)]
"""seed of a generator, as every library here takes it"""

_BOUNDS: dict[type, tuple[str, Callable[[Any, Any], bool], str]] = {
    Ge: ("ge", operator.ge, "at least"),
    Gt: ("gt", operator.gt, "above"),
    Le: ("le", operator.le, "at most"),
    Lt: ("lt", operator.lt, "below"),
}


class Checked:
    """Base of the options of a program: a dataclass whose bounds hold, with all that is in it."""

    def __post_init__(self) -> None:
        check_bounds(self)


def check_bounds(options: Any) -> None:
    """Compare every number in a dataclass, and in those inside it, with the bounds beside it.

    Raises:
        ValueError: one is out of bounds or not finite, or values are too few; names the option as
            the command line does.
    """
    for name, value, notes in annotated(options):
        option = "--" + name.replace("_", "-")
        values = value if isinstance(value, tuple | list) else (value,)
        for note in notes:
            if isinstance(note, MinLen) and len(values) < note.min_length:
                raise UserError(f"{option} must have at least {note.min_length} value(s)")
        for each in values:
            if not isinstance(each, int | float) or isinstance(each, bool):
                continue
            bounds = [(_BOUNDS[type(note)], note) for note in notes if type(note) in _BOUNDS]
            wanted = [f"{words} {getattr(note, key)}" for (key, _, words), note in bounds]
            held = (compare(each, getattr(note, key)) for (key, compare, _), note in bounds)
            if not math.isfinite(each) or not all(held):
                must = " and ".join(wanted) or "finite"
                raise UserError(f"{option} {each} must be {must}")


def annotated(options: Any, above: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(dotted name, value, notes beside its type) of every option in a dataclass."""
    hints = _hints(cast(Hashable, type(options)))
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), above + field.name
        notes = tuple(getattr(hints[field.name], "__metadata__", ()))
        if dataclasses.is_dataclass(value):
            for inner, held, own in annotated(value, f"{name}."):
                yield inner, held, (*notes, *own)
        else:
            yield name, value, notes


def flat(options: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested options as plain data, by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= (
            flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
        )
    return found


def restored(kind: type[Options], plain: dict[str, Any]) -> Options:
    """A dataclass of options out of plain data as JSON keeps it.

    Options that are not there are as by default; what is there besides is passed over.
    """
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if name in plain:
            value = plain[name]
            kinds = {get_origin(each) or each for each in (hint, *get_args(hint))}
            if dataclasses.is_dataclass(hint):
                value = restored(cast(type, hint), value)
            elif isinstance(value, list) and tuple in kinds:
                value = tuple(value)
            elif isinstance(value, str) and Path in kinds:
                value = Path(value)
            values[name] = value
    return kind(**values)


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
