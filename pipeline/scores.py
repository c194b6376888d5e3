"""Specs of scores: kind, parameters, and the id under which the cache keeps the maps.

Pixel scores (`ScoreSpec`) are computed once ahead of training, scores by a model in training
(`ModelScoreSpec`) again and again as it learns. Other packages add kinds of both by entry points in
`famt.scores` and `famt.model_scores`; see docs/custom-scores.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from blake3 import blake3

from famt.pipeline.errors import UserError
from famt.pipeline.options import Checked, restored
from famt.pipeline.plugins import find_plugin
from famt.pixel_kinds import BANDS, DEFAULT_KIND, PIXEL_KINDS, check_pixel_score

if TYPE_CHECKING:  # command lines are parsed before torch is imported
    from torch import Tensor

# Raise these when the numbers of an existing kind change.
_CODE_VERSION = 3
_MODEL_CODE_VERSION = 1

_MAX_SIZE = 1024  # px; a batch of such squares takes 1.6 GB as floats

MODEL_KINDS = ("attention", "cls_attention", "token_frequency", "frequency_attention")
"""kinds that `famt.pipeline.scoring.model_scores` computes"""


@dataclass(frozen=True)
class ScoreSpec(Checked):
    """A pixel score and all that its numbers depend on. Equal specs share cached maps."""

    kind: str = DEFAULT_KIND
    """which score: hypercomplex_fourier, hypercomplex_fourier_scales, frequency_tuned, bandpass,
    highpass, lowpass, spectral_residual, border_geodesic (a saliency prior, not a spectrum), or one
    that an installed package adds; `famt benchmark quality` compares them"""
    grid: Annotated[int, Ge(1)] = 14
    """cells a side of a stored map, over the whole image"""
    pixels_per_cell: Annotated[int, Ge(1)] = 4
    """images are squashed to this many pixels a cell before they are scored"""
    band: Annotated[tuple[float, float] | None, Ge(0)] = None
    """(low, high) edges of the pass band in cycles per image side, for the kinds that have one; the
    kind's own if left out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind in PIXEL_KINDS:
            try:
                check_pixel_score(self.grid, self.kind, self.band)
            except ValueError as error:
                raise UserError(str(error)) from None
        elif self.band is not None:
            raise UserError(f"band is for {', '.join(BANDS)}; {self.kind!r} takes none")
        else:
            _pixel_plugin(self.kind)
        if self.size > _MAX_SIZE:
            raise UserError(
                f"grid x pixels_per_cell must be at most {_MAX_SIZE} px, got {self.size}"
            )

    @property
    def size(self) -> int:
        """Side in px of the square that images are squashed to."""
        return self.grid * self.pixels_per_cell

    def describe(self) -> dict[str, object]:
        """The spec as plain data, to be kept as JSON."""
        builtin = self.kind in PIXEL_KINDS
        code = _CODE_VERSION if builtin else _version(_pixel_plugin(self.kind))
        plain: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**plain, "code_version": code}

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> ScoreSpec | None:
        """Inverse of `describe`; None for a description by code of another version."""
        try:
            spec = restored(cls, described)
            return spec if spec.describe() == described else None
        except (TypeError, UserError):
            return None

    @cached_property
    def id(self) -> str:
        """Hash of kind, parameters and code version: `<kind>-<12 hex digits>`."""
        described = json.dumps(self.describe(), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"

    def score(self, images: Tensor) -> Tensor:
        """`[B, size, size, 3]` uint8 -> `[B, grid, grid]` float32, mean 1 an image.

        Raises:
            UserError: another package's score is invalid.
        """
        import torch

        from famt.frequency import pixel_frequency

        if self.kind not in PIXEL_KINDS:
            scores = _pixel_plugin(self.kind).load()(images, self.grid)
            return checked_maps(scores, (len(images), self.grid, self.grid), self.kind)
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        kind: Any = self.kind
        return pixel_frequency(pixels.div_(255), self.grid, kind, self.band)


@dataclass(frozen=True)
class ModelScoreSpec:
    """A score by a certain encoder, and all that its numbers depend on."""

    kind: str
    """one of `MODEL_KINDS`, or of those that installed packages add"""
    grid: int
    """cells a side: the encoder's patches"""
    image_size: int
    """side of the squares that images are squashed to, px"""
    encoder: str
    """`encoder_digest` of its weights"""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 computes under autocast"""

    def describe(self) -> dict[str, object]:
        """The spec as plain data, to be kept as JSON.

        Raises:
            UserError: no such kind is installed.
        """
        code: int | str = _MODEL_CODE_VERSION
        if self.kind not in MODEL_KINDS:
            code = _version(model_plugin(self.kind))
        return {**dataclasses.asdict(self), "code_version": code}


def encoder_digest(weights: Mapping[str, Tensor]) -> str:
    """Hash of an encoder's weights: 32 hex digits."""
    import torch

    digest = blake3()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def check_model_kinds(kinds: Iterable[str]) -> None:
    """Refuse kinds of model score that are not installed; the UserError names all there are."""
    for kind in kinds:
        if kind not in MODEL_KINDS:
            model_plugin(kind)


def model_plugin(kind: str) -> EntryPoint:
    """The model score of that kind that an installed package adds, or a UserError."""
    return find_plugin("famt.model_scores", kind, MODEL_KINDS, f"no score of kind {kind!r}")


def _pixel_plugin(kind: str) -> EntryPoint:
    return find_plugin("famt.scores", kind, PIXEL_KINDS, f"no score of kind {kind!r}")


def _version(plugin: EntryPoint) -> str:
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "unknown"


def checked_maps(scores: Tensor, shape: tuple[int, int, int], kind: str) -> Tensor:
    """Scores `[B, G, G]` over their image's mean; all ones for an image of zeros.

    Raises:
        UserError: they are not of that shape, finite and >= 0; names their kind.
    """
    from famt.frequency import unit_mean

    if scores.shape != shape or not scores.isfinite().all() or (scores < 0).any():
        raise UserError(
            f"scores of kind {kind!r} must be finite, >= 0 and {list(shape)}, "
            f"got {list(scores.shape)} from {scores.min()} to {scores.max()}"
        )
    return unit_mean(scores.float(), flat_below=0.0)
