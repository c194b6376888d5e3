"""Recipes: files that set the defaults of a run's options, with their cost and result.

    about = "75 % masked at random, nothing thrown"     # one line
    extends = "famt"                                    # recipe to start from
    options = "--join.mask-ratio 0.75"                  # as on the command line
    commands = "torchrun ..."                           # from the data to the result
    cost = "8 minutes on 2 CPU cores"
    result = "not measured yet"

All keys are optional. `extends` names a built-in recipe, or a file beside the recipe's own; without
it a recipe extends the default one.
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from famt.pipeline.errors import UserError

DEFAULT = "famt"
"""The recipe of a run without --recipe."""

_FOLDER = Path(__file__).parent / "recipes"
_TEXTS = ("about", "options", "commands", "cost", "result")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        path: its file.
        extends: the recipe it starts from; None for the default recipe alone.
        options: words of a command line, without comments.
        about, commands, cost, result: text; "" where the file has none.
    """

    path: Path
    extends: Recipe | None
    options: list[str]
    about: str
    commands: str
    cost: str
    result: str


@dataclass(frozen=True)
class Recipes:
    """Which recipe to show."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """a recipe, or the path of your own file; if not given, all are listed"""


def main(args: Recipes) -> None:
    """Print a line for each recipe, or one recipe's file."""
    if args.name is None:
        print(overview())
    else:
        print(load(args.name).path.read_text(encoding="utf-8"), end="")


def names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def overview() -> str:
    """A line for each built-in recipe."""
    ours = {name: load(name).about for name in names()}
    width = max(map(len, ours))
    return "\n".join(f"    {name:{width}}  {about}" for name, about in ours.items())


def load(recipe: str) -> Recipe:
    """A built-in recipe by name, or any other by its path.

    Raises:
        UserError: no such recipe, or a wrong file; names the file.
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
    """The recipe in a file, which those in `above` extend."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    if unknown := sorted(content.keys() - {"extends", *_TEXTS}):
        raise UserError(
            f"{path}: unknown key {unknown[0]!r}; a recipe has {', '.join(('extends', *_TEXTS))}"
        )
    for key, value in content.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: {key} must be a string")
    texts = {key: content.get(key, "").strip() for key in _TEXTS}
    try:
        options = shlex.split(texts.pop("options"), comments=True)
    except ValueError as error:
        raise UserError(f"{path}: options: {error}") from None
    if any(each.partition("=")[0] == "--recipe" for each in options):
        raise UserError(f"{path}: options: use extends = ... instead of --recipe")
    base = None
    if "extends" in content or not path.samefile(_FOLDER / f"{DEFAULT}.toml"):
        extends = content.get("extends", DEFAULT)
        found = _find(extends, path.parent, f"{path}: extends")
        above = (*above, path.resolve())
        if found.resolve() in above:
            raise UserError(f"{path}: extends {extends}, which extends this one")
        base = _read(found, above)
    return Recipe(path, base, options, **texts)
