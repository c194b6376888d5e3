"""Recipes: files that set the defaults of a run's options, and say what comes of them.

    about = "75 % masked at random, nothing thrown"     # in one line
    extends = "famt"                                    # the recipe that this one builds on
    options = "--join.mask-ratio 0.75"                  # as the command line takes them
    commands = "torchrun ..."                           # what to type, from the data to the number
    cost = "8 minutes on 2 CPU cores"
    result = "not measured yet"

Every key may be left out. `extends` names one of ours, or a file beside the recipe's own; without
it a recipe builds on the default one.
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

from famt.pipeline.errors import UserError
from famt.train.options import Recipes

DEFAULT = "famt"
"""The recipe of a run that names none."""

_FOLDER = Path(__file__).parent / "recipes"
_TEXTS = ("about", "options", "commands", "cost", "result")


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file tells it.

    Attributes:
        path: of the file.
        extends: what it builds on; the default recipe alone builds on nothing.
        options: words of the command line; shell comments are taken out.
        about, commands, cost, result: text; "" where the file says nothing.
    """

    path: Path
    extends: Recipe | None
    options: list[str]
    about: str
    commands: str
    cost: str
    result: str


def main(args: Recipes) -> None:
    """Print a line for each recipe, or the file of one."""
    if args.name is None:
        print(overview())
    else:
        print(load(args.name).path.read_text(encoding="utf-8"), end="")


def names() -> list[str]:
    """Of our own recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def overview() -> str:
    """A line for each of our own recipes."""
    ours = {name: load(name).about for name in names()}
    width = max(map(len, ours))
    return "\n".join(f"    {name:{width}}  {about}" for name, about in ours.items())


def load(recipe: str) -> Recipe:
    """One of our own recipes by its name, or any other by the path of its file.

    Raises:
        ValueError: there is none, or a file is no recipe; names the file.
    """
    return _read(_find(recipe, Path(), "--recipe"), ())


def _find(recipe: str, beside: Path, asked_by: str) -> Path:
    if recipe in names():
        return _FOLDER / f"{recipe}.toml"
    path = beside / recipe
    if path.suffix == ".toml" and path.is_file():
        return path
    raise UserError(
        f"{asked_by} {recipe}: no such recipe; give the path of a .toml file, or one of "
        f"{', '.join(names())}"
    )


def _read(path: Path, above: tuple[Path, ...]) -> Recipe:
    """The recipe in a file, which those in `above` build on."""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    if unknown := sorted(told.keys() - {"extends", *_TEXTS}):
        raise UserError(
            f"{path}: unknown key {unknown[0]!r}; a recipe has {', '.join(('extends', *_TEXTS))}"
        )
    for key, value in told.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: {key} must be a text in quotes")
    texts = {key: told.get(key, "").strip() for key in _TEXTS}
    try:
        options = shlex.split(texts.pop("options"), comments=True)
    except ValueError as error:
        raise UserError(f"{path}: options: {error}") from None
    if any(each.partition("=")[0] == "--recipe" for each in options):
        raise UserError(f"{path}: options: say extends = ... in place of --recipe")
    base = None
    if "extends" in told or not path.samefile(_FOLDER / f"{DEFAULT}.toml"):
        extends = told.get("extends", DEFAULT)
        found = _find(extends, path.parent, f"{path}: extends")
        above = (*above, path.resolve())
        if found.resolve() in above:
            raise UserError(f"{path}: extends {extends}, which builds on this one")
        base = _read(found, above)
    return Recipe(path, base, options, **texts)
