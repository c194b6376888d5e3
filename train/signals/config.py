"""The signals of a run on the command line: three slots, each with a source and an exponent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from famt.pipeline.options import FREE, PLACE

OFF = "off"


class Slot:
    """What a run's weights can be made of: a source and its options."""

    source: str

    @property
    def is_off(self) -> bool:
        """Whether there is no signal in the slot."""
        return self.source == OFF

    @property
    def is_cached(self) -> bool:
        """Whether the source reads the pixel score from the cache."""
        return self.source.startswith("cached")

    @property
    def is_refreshed(self) -> bool:
        """Whether a job beside the training makes its scores anew."""
        return "refreshed" in self.source


@dataclass(frozen=True)
class FrequencyConfig(Slot):
    """How much frequency content a patch has, in the image's pixels or in the encoder's tokens."""

    source: str = "cached-then-refreshed"
    """off; cached (the pixel score of --spec, from the cache); refreshed (a score of the model in
    training, made anew of whole images by a job beside it); cached-then-refreshed (the first until
    there is the second); cached-of-others (of another image each, for control); or a source that an
    installed package adds"""
    exponent: Annotated[float, Ge(0)] = 1.0
    """power in the weight of a refreshed score, or of an added source"""
    cached_exponent: Annotated[float, Ge(0)] = 0.25
    """power in the weight of the pixel score, whose peaks are higher"""
    kind: str = "token_frequency"
    """which model score is refreshed: token_frequency, attention, cls_attention,
    frequency_attention (the first times the second, the paper's weight), or one that an installed
    package adds"""


@dataclass(frozen=True)
class AttentionConfig(Slot):
    """What the encoder looks at."""

    source: str = "rolling"
    """off; live (a forward pass on every whole crop); rolling (maps of which a part is refreshed
    each step by such a pass); seen (maps of what the step's own pass pays to the visible patches:
    no pass of its own); refreshed (of whole images, as for --frequency); or one of a package"""
    exponent: Annotated[float, Ge(0)] = 1.0
    """its power in the weight"""
    kind: str = "attention"
    """attention (FAMT's formula), cls_attention (AMT's); a live, rolling or refreshed source takes
    any model score, as --frequency.kind does"""
    every: Annotated[int, Ge(1)] = 8
    """rolling: a forward pass refreshes 1/every of each batch, the longest unseen first"""
    image_size: Annotated[int | None, Ge(1)] = None
    """rolling: side of the crops in that pass, px; half the model's if left out"""


@dataclass(frozen=True)
class HardnessConfig(Slot):
    """What the model finds hard to reconstruct."""

    source: str = "off"
    """off; errors (maps of the masked patches' reconstruction errors, by rank within the crop); or
    one of a package"""
    exponent: Annotated[float, Ge(0)] = 1.0
    """its power in the weight"""


@dataclass(frozen=True)
class RefreshConfig:
    """When refreshed scores are made anew: a generation of maps at a time."""

    every: Annotated[int | None, Ge(1)] = None
    """epochs from one generation of maps to the next, a tenth of --epochs if left out; the first is
    due after as many, or where --plain-epochs end"""
    wait: Annotated[bool, FREE] = False
    """wait for a generation that is due, as the paper does, rather than take it up when it is
    there"""
    pin: Annotated[Path | None, PLACE] = None
    """use this one generation, and make none: the path of a generation-<step>.zip, in the folder
    `refresh` of any run or where `famt refresh --out` put it"""
