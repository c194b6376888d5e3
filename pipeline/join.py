"""The join: crops meet the scores of their images, and leave as the patches that training needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from famt.geometry import crop_maps
from famt.patches import gather_patches
from famt.sampling import PatchSplit, patch_weights, sample_patches
from pipeline.loader import CropBatch


@dataclass(frozen=True)
class JoinConfig:
    """How signals become a split."""

    mask_ratio: float = 0.45
    """share of the patches that are hidden and reconstructed"""
    throw_ratio: float = 0.40
    """share of the patches that are left out of everything"""
    frequency_exponent: float = 0.25
    """power of the cached frequency score in the weight; 0 ignores it"""
    attention_exponent: float = 1.0
    """power of the attention score in the weight, where there is one; 0 ignores it"""


@dataclass(frozen=True)
class PatchBatch:
    """What training takes of a batch: pixels of two of the three groups, and where they lie.

    Attributes:
        visible: `[B, V, P*P*3]` uint8 pixels of the patches that the encoder sees.
        masked: `[B, M, P*P*3]` uint8 pixels of the patches to reconstruct.
        split: positions of all three groups, on the device of the pixels.
        rows: `[B]` int64 on the CPU, rows in the `SampleTable`.
    """

    visible: Tensor
    masked: Tensor
    split: PatchSplit
    rows: Tensor

    def chunk(self, parts: int) -> list[PatchBatch]:
        """The batch in equal parts, one after another."""
        splits = zip(*(each.chunk(parts) for each in vars(self.split).values()), strict=True)
        others = (each.chunk(parts) for each in (self.visible, self.masked, self.rows))
        return [
            PatchBatch(visible, masked, PatchSplit(*split), rows)
            for split, visible, masked, rows in zip(splits, *others, strict=True)
        ]


def crop_scores(maps: Tensor, crops: CropBatch, grid: int) -> Tensor:
    """What maps of whole images say about crops of them.

    Args:
        maps: `[R, G, G]` float on the CPU, a row an image.
        crops: views on images.
        grid: patches a side of a crop.

    Returns:
        `[B, grid**2]` float32 on the crops' device.
    """
    device = crops.images.device
    windows, flips = crops.windows.to(device), crops.flips.to(device)
    return crop_maps(maps[crops.rows].to(device), windows, flips, grid).flatten(1)


def join_weights(
    crops: CropBatch,
    maps: Tensor | None,
    grid: int,
    config: JoinConfig,
    attention: Tensor | None = None,
) -> Tensor:
    """Weight of every patch of every crop, on the crops' device.

    Args:
        crops: views on images.
        maps: `[R, G, G]` the images' score maps, or None for none.
        grid: patches a side of a crop.
        config: exponents.
        attention: `[B, grid**2]` attention scores of the crops, if there are any.

    Returns:
        `[B, grid**2]` float32, >= 0; all ones if there is no signal at all.
    """
    signals: dict[str, Tensor] = {}
    if maps is not None:
        signals["frequency"] = crop_scores(maps, crops, grid)
    if attention is not None:
        signals["attention"] = attention
    if not signals:
        return torch.ones(len(crops.rows), grid**2, device=crops.images.device)
    return patch_weights(
        signals,
        {"frequency": config.frequency_exponent, "attention": config.attention_exponent},
    )


def split_crops(
    crops: CropBatch,
    weights: Tensor,
    patch_size: int,
    config: JoinConfig,
    generator: torch.Generator | None = None,
) -> PatchBatch:
    """Sample masked, thrown and visible patches by weight and gather the pixels that are needed."""
    split = sample_patches(weights, config.mask_ratio, config.throw_ratio, generator)
    return PatchBatch(
        visible=gather_patches(crops.images, split.visible, patch_size),
        masked=gather_patches(crops.images, split.masked, patch_size),
        split=split,
        rows=crops.rows,
    )
