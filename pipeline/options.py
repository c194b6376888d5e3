"""Options with bounds and notes beside them, and the options of the loader and of masking.

Bounds are those of the `annotated-types` package: `Ge`, `Gt`, `Le`, `Lt`, and `MinLen` for an
option of several values. `Checked` compares them:

    epochs: Annotated[int, Ge(1)] = 800
    flip: Annotated[float, Ge(0), Le(1)] = 0.5

Modules of options import nothing heavy: command lines are parsed before torch is imported.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from famt.patch_counts import Predicted, Thrown, Visible
from famt.pipeline.errors import UserError

Options = TypeVar("Options")

FREE = "may differ on resume"
"""note on an option of a run: nothing that is learned depends on it"""
ELASTIC = "may differ on resume with --elastic"
"""note on an option of a run: it may change at the beginning of an epoch"""
MAIN = "shown by --help"
"""note on an option that matters most, of a program with many"""
PLACE = "a path or URL"
"""note on an option: it is recorded so that it holds in any working directory"""


@dataclass(frozen=True)
class Since:
    """Note on an option of a run that older checkpoints of the same format lack.

    Every option added to a run needs one, or all runs before it could not be resumed.

    Attributes:
        before: value that stands for the behaviour before there was the option, as JSON keeps it.
    """

    before: Any


Seed = Annotated[int, Ge(0), Lt(2**32)]
"""seed of a generator, as every library here takes it"""

_BOUNDS: dict[type, tuple[str, Callable[[Any, Any], bool], str]] = {
    Ge: ("ge", operator.ge, "at least"),
    Gt: ("gt", operator.gt, "above"),
    Le: ("le", operator.le, "at most"),
    Lt: ("lt", operator.lt, "below"),
}


class Checked:
    """Base of a dataclass of options that checks its numbers, and those of nested dataclasses.

    Raises:
        UserError: a number is out of bounds or not finite, or values are too few; names the option
            as on the command line.
    """

    def __post_init__(self) -> None:
        for name, value, notes in annotated(self):
            option = "--" + name.replace("_", "-")
            values = value if isinstance(value, tuple | list) else (value,)
            bounds = []
            for note in notes:
                if isinstance(note, MinLen) and len(values) < note.min_length:
                    raise UserError(f"{option} must have at least {note.min_length} value(s)")
                if type(note) in _BOUNDS:
                    attribute, holds, words = _BOUNDS[type(note)]
                    bounds.append((holds, getattr(note, attribute), words))
            for each in values:
                if not isinstance(each, int | float) or isinstance(each, bool):
                    continue
                if not math.isfinite(each) or not all(holds(each, end) for holds, end, _ in bounds):
                    must = " and ".join(f"{words} {end}" for _, end, words in bounds) or "finite"
                    raise UserError(f"{option} {each} must be {must}")


def annotated(options: Any, above: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(dotted name, value, notes) of every option in a dataclass."""
    for own_name, notes in notes_of(type(options)).items():
        value, name = getattr(options, own_name), above + own_name
        if dataclasses.is_dataclass(value):
            for inner, held, own in annotated(value, f"{name}."):
                yield inner, held, (*notes, *own)
        else:
            yield name, value, notes


def differing(options: Any, **needed: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """`annotated` of those options that differ from the defaults in the code; `needed` holds values
    for those that have none."""
    defaults = {name: value for name, value, _ in annotated(type(options)(**needed))}
    for name, value, notes in annotated(options):
        if value != defaults[name]:
            yield name, value, notes


def flat(options: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested plain data by dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found


def restored(kind: type[Options], plain: dict[str, Any]) -> Options:
    """A dataclass of options from JSON's plain data.

    Missing options keep their defaults; unknown ones are ignored.
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


def notes_of(kind: type) -> dict[str, tuple[Any, ...]]:
    """Notes on the options of a dataclass, by name."""
    return _notes_of(cast(Hashable, kind))


@cache
def _notes_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind, include_extras=True)
    names = (each.name for each in dataclasses.fields(kind))
    return {name: tuple(getattr(hints[name], "__metadata__", ())) for name in names}


Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class RandomView:
    """A random resized crop and flip, drawn as torchvision's RandomResizedCrop does."""

    area: Annotated[tuple[float, float], Gt(0), Le(1)] = (0.2, 1.0)
    """range of the crop's share of the image area"""
    aspect_ratio: Annotated[tuple[float, float], Gt(0)] = (3 / 4, 4 / 3)
    """range of the crop's width over height, before it is squashed to a square"""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """probability of a left-right flip"""

    def __post_init__(self) -> None:
        for name in ("area", "aspect_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{name} {low} {high} must be the smaller end, then the larger")


@dataclass(frozen=True)
class CentreView:
    """The central square, `fraction` of the image's shorter side."""

    fraction: Annotated[float, Gt(0), Le(1)] = 0.875


@dataclass(frozen=True)
class WholeView:
    """The whole image, squashed to a square."""


View = RandomView | CentreView | WholeView


@dataclass(frozen=True)
class DecodeConfig:
    """How images are decoded for a GPU; a CPU ignores it."""

    on: Literal["auto", "gpu", "cpu"] = "auto"
    """device that decodes; with cpu the GPU resizes what threads decode. auto: cpu for crops below
    128 px, whose images are small too and suit a GPU's decoder badly"""
    hardware_share: Annotated[float, Ge(0), Le(1)] = 0.65
    """share of a batch for the GPU's hardware decoder, if it has one; threads and CUDA cores decode
    the rest, so more threads want a smaller share"""
    preallocate: Annotated[int, Ge(0)] = 0
    """side of images, px, for which the hardware decoder allocates memory at the start; 0 lets it
    grow with the images"""


@dataclass(frozen=True)
class LoaderOptions(Checked):
    """Options of the loader on a training's command line."""

    batch_size: Annotated[int, Ge(1), ELASTIC, MAIN] = 64
    """crops per step on each rank"""
    crops_per_image: Annotated[int, Ge(1), ELASTIC] = 1
    """crops of each image in a batch (repeated augmentation); the image is decoded once for all of
    them. An epoch decodes every image once, so it has that many times the steps: 800 epochs of 1
    crop equal 200 epochs of 4"""
    interpolation: Interpolation = "bicubic"
    """how crops are resized, with antialiasing"""
    shuffle_buffer: Annotated[int, Ge(0)] = 4096
    """encoded images in the shuffle buffer; 0 reads in shard order"""
    threads: Annotated[int | None, Ge(1), FREE] = None
    """CPU threads that decode, on each rank; its share of the cores if not given"""
    resident: bool = False
    """decode each image once and keep it in the device's memory, where crops are cut: for small
    sets, 3 bytes per pixel"""
    decode: Annotated[DecodeConfig, FREE] = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.crops_per_image:
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of --crops-per-image "
                f"{self.crops_per_image}"
            )

    @property
    def images_per_batch(self) -> int:
        """Images decoded for a batch."""
        return self.batch_size // self.crops_per_image


@dataclass(frozen=True)
class LoaderConfig(LoaderOptions):
    """How crops are read, resized and cut."""

    image_size: Annotated[int, Ge(1)] = 224
    """side of the square crops, px"""
    view: View = field(default_factory=RandomView)
    """which part of an image a crop shows"""


CACHED_EXPONENT = 0.25
"""Exponent of the cached pixel score in the weight of a patch."""
ROLLING_EVERY = 8
"""Rolling attention looks at 1/8 of each batch: at half size, 1 to 3 % of a step of ViT-B."""


@dataclass(frozen=True)
class JoinConfig:
    """How patches are masked and thrown by their weights."""

    mask_ratio: Annotated[float, Ge(0), Lt(1)] = 0.45
    """share of the patches that are masked, to be reconstructed"""
    throw_ratio: Annotated[float, Ge(0), Lt(1)] = 0.40
    """share of the patches that are thrown, and enter nothing"""
    visible: Visible = "lightest"
    """which patches are visible: the lightest, left over by masking and throwing, or a uniform draw
    made first, as MAE's"""
    thrown: Thrown = "heaviest"
    """which patches are thrown: the heaviest after the masked ones, or the lightest of all"""
    blend: Annotated[tuple[float, float], Ge(0), Le(1)] = (1.0, 1.0)
    """influence of the weights at the first and at the last step, linear in between: 0 draws
    uniformly, 1 by weight alone"""
    predicted_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """share of the masked patches that are reconstructed; the others cost nothing"""
    predicted: Predicted = "random"
    """which masked patches these are: a uniform draw, or spread far from each other"""
    loss_exponent: Annotated[float, Ge(0)] = 0.0
    """power of a patch's weight in its factor of the loss; 0 counts all patches equally"""

    def blend_at(self, progress: float) -> float:
        """Influence of the weights when `progress` in [0, 1] of the run's steps are done."""
        first, last = self.blend
        return first + (last - first) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class Encoding:
    """How images are stored. Files are copied byte for byte unless `max_side` is given."""

    max_side: Annotated[int | None, Ge(1)] = None
    """shrink images whose longer side is above this many px, and store them as JPEG"""
    quality: Annotated[int, Ge(1), Le(100)] = 90
    """JPEG quality of what is re-encoded, 1 to 100"""
