from dataclasses import dataclass, field
from typing import Annotated

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen

from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, Checked, annotated


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Gt(0), Lt(1)] = 0.5
    ends: Annotated[tuple[float, float], Ge(0), Le(1)] = (0.0, 1.0)


@dataclass(frozen=True)
class Program(Checked):
    count: Annotated[int, Ge(1), FREE] = 1
    size_of_it: Annotated[int | None, Ge(2)] = None
    name: str = "x"
    names: Annotated[tuple[str, ...], MinLen(1)] = ("a",)
    free: float = 7.0
    inner: Annotated[Inner, ELASTIC] = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--count 0 must be at least 1"),
        ({"size_of_it": 1}, "--size-of-it 1 must be at least 2"),
        ({"free": float("nan")}, "--free nan must be finite"),
        ({"names": ()}, r"--names must have at least 1 value\(s\)"),
        ({"inner": Inner(share=1.0)}, "--inner.share 1.0 must be above 0 and below 1"),
        ({"inner": Inner(share=float("inf"))}, "--inner.share inf must be above 0 and below 1"),
        ({"inner": Inner(ends=(0.0, 1.1))}, "--inner.ends 1.1 must be at least 0 and at most 1"),
    ],
)
def test_what_is_out_of_bounds_is_named_as_on_the_command_line(options, message):
    with pytest.raises(UserError, match=message):
        Program(**options)


def test_bounds_are_held_at_their_edges():
    Program(count=1, size_of_it=2, inner=Inner(0.001, (0.0, 1.0)))
    Program(size_of_it=None)


def test_notes_stand_beside_the_options_and_those_inside_them():
    notes = {name: beside for name, _, beside in annotated(Program())}
    assert FREE in notes["count"]
    assert ELASTIC in notes["inner.share"]
    assert notes["name"] == ()
