"""Options of a run's signals: three slots, each with a source and an exponent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from annotated_types import Ge

from famt.pipeline.options import CACHED_EXPONENT, FREE, PLACE, ROLLING_EVERY
from famt.pipeline.plugins import find_plugin

if TYPE_CHECKING:
    from famt.train.signals.signal import Context, Signal

OFF = "off"


class Slot:
    """A factor of the patches' weights: its source and options.

    Attributes:
        name: of the slot.
        sources: its sources, by name: module and class in `famt.train.signals`. Packages add
            sources to all slots, by entry points in "famt.signals".
        source: the chosen one, or "off".
    """

    name: ClassVar[str]
    sources: ClassVar[dict[str, str]]
    source: str

    @property
    def is_off(self) -> bool:
        """Whether the slot is empty."""
        return self.source == OFF

    @property
    def signal(self) -> Callable[[Any, Context], Signal]:
        """The class of the source of a slot that is not off.

        Raises:
            UserError: no such source.
        """
        if self.source in self.sources:
            found = resolve_name(f"famt.train.signals.{self.sources[self.source]}")
        else:
            asked = f"--{self.name}.source {self.source}"
            found = find_plugin("famt.signals", self.source, [OFF, *self.sources], asked).load()
        return cast("Callable[[Any, Context], Signal]", found)

    def build(self, context: Context) -> Signal:
        """The signal of a slot that is not off; raises as `signal`."""
        signal = self.signal(self, context)
        signal.name = self.name
        return signal

    @property
    def is_cached(self) -> bool:
        """Whether the source reads the pixel score from the cache."""
        return not self.is_off and getattr(self.signal, "reads_cache", False)

    @property
    def is_refreshed(self) -> bool:
        """Whether its scores come from the refresh job."""
        return not self.is_off and getattr(self.signal, "needs_refresh", False)


@dataclass(frozen=True)
class FrequencyConfig(Slot):
    """Frequency content of a patch, in the image's pixels or in the encoder's tokens."""

    name: ClassVar = "frequency"
    sources: ClassVar = {
        "cached": "cached:Cached",
        "cached-of-others": "cached:CachedOfOthers",
        "refreshed": "refreshed:Refreshed",
        "cached-then-refreshed": "refreshed:CachedThenRefreshed",
    }

    source: str = "cached-then-refreshed"
    """off; cached: the pixel score of --spec, from the cache; refreshed: a score by the model in
    training, which a job beside it recomputes for whole images; cached-then-refreshed: the former
    until the first refresh; cached-of-others: each image gets another image's score, as a control;
    or a source of an installed package"""
    exponent: Annotated[float, Ge(0)] = 1.0
    """exponent in the weight of a refreshed score or a package's source"""
    cached_exponent: Annotated[float, Ge(0)] = CACHED_EXPONENT
    """exponent in the weight of the pixel score, which has higher peaks"""
    kind: str = "token_frequency"
    """score to refresh: token_frequency, attention, cls_attention, frequency_attention (the first
    times the second, the paper's weight), or one of an installed package"""


@dataclass(frozen=True)
class AttentionConfig(Slot):
    """Attention that a patch receives in the encoder."""

    name: ClassVar = "attention"
    sources: ClassVar = {
        "live": "attention:Live",
        "rolling": "attention:Rolling",
        "seen": "seen:Seen",
        "refreshed": "refreshed:Refreshed",
    }

    source: str = "rolling"
    """off; live: an extra forward pass on every whole crop; rolling: stored maps, and each step
    updates a part of them by such a pass; seen: stored maps of the attention to visible patches in
    the training pass, without an extra one; refreshed: of whole images, as in --frequency.source;
    or a source of an installed package"""
    exponent: Annotated[float, Ge(0)] = 1.0
    """exponent in the weight"""
    kind: str = "attention"
    """attention (FAMT's formula) or cls_attention (AMT's); live, rolling and refreshed sources take
    any score of --frequency.kind"""
    every: Annotated[int, Ge(1)] = ROLLING_EVERY
    """rolling: each step updates 1/every of its batch, the images not seen for longest first"""
    image_size: Annotated[int | None, Ge(1)] = None
    """rolling: side of the crops in the extra pass, px; half the model's if not given"""


@dataclass(frozen=True)
class HardnessConfig(Slot):
    """How hard a patch is to reconstruct."""

    name: ClassVar = "hardness"
    sources: ClassVar = {
        "errors": "banked:Errors",
    }

    source: str = "off"
    """off; errors: stored maps of the masked patches' reconstruction errors, as ranks within the
    crop; or a source of an installed package"""
    exponent: Annotated[float, Ge(0)] = 1.0
    """exponent in the weight"""


@dataclass(frozen=True)
class RefreshConfig:
    """When refreshed scores are recomputed, a generation of maps at a time."""

    every: Annotated[int | None, Ge(1)] = None
    """epochs between generations; if not given, a tenth of --epochs. The first is due after as many
    epochs, or after --plain-epochs"""
    wait: Annotated[bool, FREE] = False
    """wait for a generation that is due, as in the paper, instead of using it once it is ready"""
    pin: Annotated[Path | None, PLACE] = None
    """use only this generation: path of a generation-<step>.zip from any run's folder `refresh` or
    from `famt refresh --out`"""
