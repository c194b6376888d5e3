"""What a score is: its kind and parameters, and the id under which the cache keeps it.

Two families: scores of pixels (`ScoreSpec`), computed once ahead of training, and scores that a
model in training gives (`ModelScoreSpec`), computed again as it learns. Both are open: a package
that declares an entry point in `famt.scores` or `famt.model_scores` adds a kind by its name; see
docs/custom-scores.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from blake3 import blake3
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.attention import attention_scores, cls_attention, last_attention, last_block
from famt.frequency import (
    DEFAULT_KIND,
    PIXEL_KINDS,
    check_pixel_score,
    pixel_frequency,
    token_frequency,
)
from pipeline.options import Checked

# Raise these with any change that alters the numbers of an existing kind.
_CODE_VERSION = 2  # 1 decoded all images by Pillow
_MODEL_CODE_VERSION = 1

_GENERATION = "generation-"
_MAX_SIZE = 1024  # px; a batch of such squares takes 1.6 GB as floats

PixelScore = Callable[[Tensor, int], Tensor]
"""images `[B, S, S, 3]` uint8 and a grid -> maps `[B, grid, grid]` float, >= 0"""
ModelScore = Callable[[VisionTransformer, Tensor], Tensor]
"""an encoder in eval mode and images `[B, 3, S, S]` float, normalised -> `[B, N]` float, >= 0"""


@dataclass(frozen=True)
class ScoreSpec(Checked):
    """A kind of pixel score and all that its numbers depend on. Equal specs share cached maps."""

    kind: str = DEFAULT_KIND
    """which score: hypercomplex_fourier, hypercomplex_fourier_scales, frequency_tuned, bandpass,
    highpass, lowpass, spectral_residual, border_geodesic (a saliency prior, not a spectrum), or one
    that an installed package adds; `python -m jobs.benchmark quality` compares them"""
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
            check_pixel_score(self.grid, self.kind, self.band)
        elif self.band is not None:
            raise ValueError(f"band is for {', '.join(PIXEL_KINDS)}; {self.kind!r} takes none")
        if self.size > _MAX_SIZE:
            raise ValueError(
                f"grid x pixels_per_cell must be at most {_MAX_SIZE} px, got {self.size}"
            )

    @property
    def size(self) -> int:
        """Side in px of the square that images are squashed to."""
        return self.grid * self.pixels_per_cell

    def describe(self) -> dict[str, object]:
        """The spec spelled out, as JSON keeps it.

        Raises:
            ValueError: no such kind here.
        """
        described = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**described, "code_version": self._code_version()}

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> ScoreSpec | None:
        """The spec that `describe` spelled out, or None if other code's scores are meant."""
        values = dict(described)
        code_version = values.pop("code_version", None)
        if values.get("band") is not None:
            values["band"] = tuple(values["band"])
        try:
            spec = cls(**values)
            return spec if spec._code_version() == code_version else None
        except (TypeError, ValueError):
            return None

    @property
    def id(self) -> str:
        """Hash of kind, parameters and code version: `<kind>-<12 hex digits>`."""
        return f"{self.kind}-{_hash(self.describe())}"

    def score(self, images: Tensor) -> Tensor:
        """`[B, size, size, 3]` uint8 -> `[B, grid, grid]` float32, mean 1 an image.

        Raises:
            ValueError: no such kind here, or another package's score is not what it must be.
        """
        if self.kind not in PIXEL_KINDS:
            scores = _named("famt.scores", PIXEL_KINDS, self.kind).load()(images, self.grid)
            return _unit_mean(scores, (len(images), self.grid, self.grid), self.kind)
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        kind: Any = self.kind
        return pixel_frequency(pixels.div_(255), self.grid, kind, self.band)

    def _code_version(self) -> int | str:
        if self.kind in PIXEL_KINDS:
            return _CODE_VERSION
        return _version(_named("famt.scores", PIXEL_KINDS, self.kind))


@dataclass(frozen=True)
class ModelScoreSpec:
    """A score that a certain encoder gives, and all that its numbers depend on."""

    kind: str
    """key of `MODEL_KINDS`, or one that an installed package adds"""
    grid: int
    """cells a side: the encoder's patches"""
    image_size: int
    """images are squashed to squares of this side, px"""
    encoder: str
    """`encoder_digest` of its weights"""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 computes under autocast"""

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= self.image_size:
            raise ValueError(f"a grid of {self.grid} cells on images of {self.image_size} px")

    def describe(self) -> dict[str, object]:
        """The spec spelled out, as JSON keeps it.

        Raises:
            ValueError: no such kind here.
        """
        code: int | str = _MODEL_CODE_VERSION
        if self.kind not in MODEL_KINDS:
            code = _version(_named("famt.model_scores", MODEL_KINDS, self.kind))
        return {**dataclasses.asdict(self), "code_version": code}

    @property
    def id(self) -> str:
        """Hash of all of it: `generation-<kind>-<12 hex digits>`."""
        return f"{_GENERATION}{self.kind}-{_hash(self.describe())}"


Spec = ScoreSpec | ModelScoreSpec


def is_generation(spec_id: str) -> bool:
    """Whether maps of this id were made by a model in training."""
    return spec_id.startswith(_GENERATION)


def encoder_digest(weights: Mapping[str, Tensor]) -> str:
    """Hash of an encoder's weights: 32 hex digits."""
    digest = blake3()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


# What the last block gives: its attention [B, H, N+1, N+1], and its patch tokens [B, N, C].
_OF_ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attention_scores,  # FAMT's formula
    "cls_attention": cls_attention,  # AMT's formula
}
_OF_BOTH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_frequency": lambda _, tokens: token_frequency(tokens),
    # The paper's weight.
    "frequency_attention": lambda attention, tokens: (
        token_frequency(tokens) * attention_scores(attention)
    ),
}
MODEL_KINDS = (*_OF_ATTENTION, *_OF_BOTH)


def check_model_kinds(kinds: Iterable[str]) -> None:
    """Refuse a kind of model score that is none.

    Raises:
        ValueError: no such kind here.
    """
    for kind in kinds:
        if kind not in MODEL_KINDS:
            _named("famt.model_scores", MODEL_KINDS, kind)


def model_scores(
    kinds: Sequence[str], encoder: VisionTransformer, images: Tensor
) -> dict[str, Tensor]:
    """Scores that an encoder gives of images, all of this package's kinds by one forward pass.

    Args:
        kinds: keys of `MODEL_KINDS`, or of other packages.
        encoder: a timm `VisionTransformer` with a class token.
        images: `[B, 3, S, S]` float, normalised.

    Returns:
        `[B, N]` float, >= 0, for each kind.

    Raises:
        ValueError: no such kind here.
    """
    scores: dict[str, Tensor] = {}
    with torch.no_grad():
        if any(kind in _OF_BOTH for kind in kinds):
            attention, tokens = last_block(encoder, images)
        elif any(kind in _OF_ATTENTION for kind in kinds):
            attention = last_attention(encoder, images)
        for kind in kinds:
            if kind in _OF_BOTH:
                scores[kind] = _OF_BOTH[kind](attention, tokens)
            elif kind in _OF_ATTENTION:
                scores[kind] = _OF_ATTENTION[kind](attention)
            else:
                function = _named("famt.model_scores", MODEL_KINDS, kind).load()
                scores[kind] = function(encoder, images)
    return scores


def model_maps(
    specs: Sequence[ModelScoreSpec], encoder: VisionTransformer, images: Tensor
) -> list[Tensor]:
    """Maps of images by several specs of one encoder: `[B, grid, grid]` float32, mean 1 an image.

    Args:
        specs: alike but for their kinds.
        encoder, images: as for `model_scores`.

    Raises:
        ValueError: no such kind here, or another package's score is not what it must be.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=specs[0].precision == "bf16"):
        scores = model_scores([spec.kind for spec in specs], encoder, images)
    return [
        _unit_mean(
            scores[spec.kind].unflatten(1, (spec.grid, spec.grid)),
            (len(images), spec.grid, spec.grid),
            spec.kind,
        )
        for spec in specs
    ]


@cache
def _plugins(group: str, builtin: tuple[str, ...]) -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group=group) if each.name not in builtin}


def _named(group: str, builtin: tuple[str, ...], kind: str) -> EntryPoint:
    added = _plugins(group, tuple(builtin))
    if kind not in added:
        raise ValueError(
            f"no score of kind {kind!r}: there are {', '.join([*builtin, *added])}. Others come "
            f"with packages that have an entry point in {group!r}; is one missing here?"
        )
    return added[kind]


def _version(plugin: EntryPoint) -> str:
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "unknown"


def _hash(described: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def _unit_mean(scores: Tensor, shape: tuple[int, ...], kind: str) -> Tensor:
    """Scores over their image's mean; an image without any scores 1 everywhere."""
    if scores.shape != shape or not scores.isfinite().all() or (scores < 0).any():
        raise ValueError(
            f"scores of kind {kind!r} must be finite, >= 0 and {list(shape)}, "
            f"got {list(scores.shape)} from {scores.min()} to {scores.max()}"
        )
    scores = scores.float()
    mean = scores.mean((1, 2), keepdim=True)
    return torch.where(mean > 0, scores / mean.where(mean > 0, 1.0), 1.0)
