"""What installed packages add by entry points: scores and signals, by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from famt.pipeline.errors import UserError


def find_plugin(group: str, name: str, builtin: Iterable[str], asked: str) -> EntryPoint:
    """The entry point of that name in a group.

    Args:
        group: such as `famt.scores`.
        builtin: names of this project's own; a package can't replace them.
        asked: the option that asked for it; starts the error message.

    Raises:
        UserError: no package has it; lists the names there are.
    """
    builtin, installed = list(builtin), _installed(group)
    if name not in installed or name in builtin:
        added = [each for each in installed if each not in builtin]
        raise UserError(
            f"{asked}: there are {', '.join([*builtin, *added])}. Others come with packages that "
            f"have an entry point in {group!r}; is one missing here?"
        )
    return installed[name]


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=group)}
