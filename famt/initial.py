"""Load weights of other encoders: resample positions and patches, report the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.masked import MaskedModel

_ENCODER = "encoder."
# Parts that a plain ViT lacks; without them the encoder would compute something else.
_FOREIGN = re.compile(r"(blocks|norm_pre|reg_token|rope|rel_pos)\b.*")


@dataclass
class Fit:
    """Which weights a model took over, by official names.

    Attributes:
        taken: loaded, bit for bit or resized.
        resized: loaded after resampling, and how.
        missing: the model's tensors that the weights lack; unchanged.
        left_out: tensors that the model has no place for.
    """

    taken: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """A line for each list that is not empty; tensors of blocks are counted."""
        lines = {
            "taken": f"{len(self.taken)} tensors",
            "resized": ", ".join(f"{name} ({how})" for name, how in self.resized.items()),
            "missing": _short(self.missing) and f"{_short(self.missing)}: as initialised",
            "left out": _short(self.left_out),
        }
        return "\n".join(f"  {name:10}{text}" for name, text in lines.items() if text)


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of an encoder, read off the shapes of its weights: width, depth, and px a side."""

    width: int
    depth: int
    patch_size: int
    image_size: int


def encoder_sizes(weights: Mapping[str, Tensor]) -> EncoderSizes:
    """Sizes of an encoder from its weights under official names.

    Raises:
        ValueError: not the weights of a ViT with a square grid of patches.
    """
    projection, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    numbers = [int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name)]
    if projection is None or projection.ndim != 4 or positions is None or not numbers:
        some = ", ".join(list(weights)[:3])
        raise ValueError(
            "no ViT encoder: patch_embed.proj.weight, pos_embed and blocks.* are not all there, "
            f"but {some}, ..."
        )
    patch_size = projection.shape[-1]
    grid = math.isqrt(positions.shape[1])
    registers = weights["reg_token"].numel() // len(projection) if "reg_token" in weights else 0
    if positions.shape[1] - grid**2 not in (0, 1, registers, 1 + registers):
        raise ValueError(f"pos_embed {list(positions.shape)} is of no square grid of patches")
    return EncoderSizes(projection.shape[0], 1 + max(numbers), patch_size, grid * patch_size)


def load_encoder_weights(encoder: VisionTransformer, weights: Mapping[str, Tensor]) -> Fit:
    """Load weights into an encoder.

    Positions are interpolated to the encoder's grid as timm does, and the patch projection to its
    patch size by the pseudo-inverse of resizing (Beyer et al., "FlexiViT", CVPR 2023). A missing
    final norm stays as it is; a classifier's head is left out.

    Args:
        encoder: without a head.
        weights: under official names.

    Raises:
        ValueError: another width or depth, blocks of another kind, a tensor of another shape, or
            missing tensors; names both sides.
    """
    own = encoder.state_dict()
    there = encoder_sizes(weights)
    width, depth = encoder.embed_dim, len(encoder.blocks)
    if (there.width, there.depth) != (width, depth):
        raise ValueError(
            f"its encoder has width {there.width} and depth {there.depth}, and this model's has "
            f"width {width} and depth {depth}"
        )
    foreign = [name for name in weights if name not in own and _FOREIGN.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"its encoder is of another kind: it has {_short(foreign)}, which this model has not"
        )
    fit, fitted = Fit(), {}
    for name, value in weights.items():
        if name == "pos_embed":
            value = _fit_positions(value, own[name], encoder, fit, name)
        elif name == "patch_embed.proj.weight" and value.shape[-1] != own[name].shape[-1]:
            value = resample_patch_embed(value, list(own[name].shape[2:]))
            fit.resized[name] = f"patches of {weights[name].shape[-1]} px to {value.shape[-1]}"
        if name not in own:
            fit.left_out.append(name)
            continue
        if value.shape != own[name].shape:
            raise ValueError(f"{name} is {list(value.shape)}, and here {list(own[name].shape)}")
        fitted[name] = value
    fit.taken = list(fitted)
    fit.missing = [name for name in own if name not in fitted]
    broken = [name for name in fit.missing if re.fullmatch(r"(blocks|patch_embed).*weight", name)]
    if broken:
        raise ValueError(f"the weights are not whole: {_short(broken)} are not there")
    encoder.load_state_dict({**own, **fitted})
    return fit


def load_weights(model: MaskedModel, weights: Mapping[str, Tensor]) -> Fit:
    """Load weights into the encoder, and into the decoder if all of its tensors fit.

    Args:
        weights: under official names, with a decoder of any kind or none.

    Raises:
        ValueError: as of `load_encoder_weights`.
    """
    own = {
        name: value for name, value in model.state_dict().items() if not name.startswith(_ENCODER)
    }
    given = {name: value for name, value in weights.items() if name in own}
    fit = load_encoder_weights(
        model.encoder, {name: value for name, value in weights.items() if name not in own}
    )
    name, resized = "decoder_pos_embed", Fit()
    positions = given.get(name)
    if positions is not None and positions.shape[-1] == own[name].shape[-1]:
        given[name] = _fit_positions(positions, own[name], model.encoder, resized, name)
    fits = given.keys() == own.keys() and all(
        given[name].shape == value.shape for name, value in own.items()
    )
    if fits and not any(name.startswith("decoder_blocks") for name in fit.left_out):
        model.load_state_dict(given, strict=False)
        fit.taken += given
        fit.resized |= resized.resized
    else:
        fit.missing += own
        fit.left_out += given
    return fit


def _fit_positions(
    positions: Tensor, own: Tensor, encoder: VisionTransformer, fit: Fit, name: str
) -> Tensor:
    """Positions `[1, P+N, C]` or `[1, N, C]` on the encoder's grid, `[1, P+M, C]` as `own`.

    P is the number of class and register tokens that have a position.
    """
    grid = math.isqrt(positions.shape[1])
    prefix = own.shape[1] - encoder.patch_embed.num_patches
    if prefix and grid**2 == positions.shape[1]:  # of patches alone: the others get nothing added
        zeros = torch.zeros_like(positions[:, :1]).expand(-1, prefix, -1)
        positions = torch.cat([zeros, positions], dim=1)
        fit.resized[name] = "none for the class token: zeros"
    size = list(encoder.patch_embed.grid_size)
    if size != [grid, grid] and positions.shape[1] == prefix + grid**2:
        positions = resample_abs_pos_embed(positions, size, [grid, grid], prefix)
        fit.resized[name] = f"{grid} x {grid} patches to {size[0]} x {size[1]}"
    return positions


def _short(names: Iterable[str]) -> str:
    """Names, those of blocks summed up: `norm.weight, decoder_blocks.0-7 (96 tensors)`."""
    blocks: dict[str, list[int]] = {}
    others = []
    for name in names:
        if match := re.match(r"(\w*blocks)\.(\d+)\.", name):
            blocks.setdefault(match[1], []).append(int(match[2]))
        else:
            others.append(name)
    summed = [f"{each}.{min(n)}-{max(n)} ({len(n)} tensors)" for each, n in blocks.items()]
    return ", ".join(others + summed)
