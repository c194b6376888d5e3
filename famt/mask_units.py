"""Units: squares of patches that are masked, thrown or seen as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from famt.sampling import PatchSplit


def unit_weights(weights: Tensor, unit: int) -> Tensor:
    """Mean weight of each unit.

    Args:
        weights: `[B, N]` float, of patches on a square grid in raster order.
        unit: patches a side of a unit; it divides the grid.

    Returns:
        `[B, N / unit**2]` of units in raster order.
    """
    side = round(weights.shape[1] ** 0.5) // unit
    return weights.reshape(-1, side, unit, side, unit).mean((2, 4)).flatten(1)


def split_of_patches(split: PatchSplit, unit: int) -> PatchSplit:
    """A split of units as a split of patches; the patches of a unit are adjacent."""
    units = sum(group.shape[1] for group in (split.masked, split.thrown, split.visible))
    side = round(units**0.5)
    within = torch.arange(unit, device=split.masked.device)

    def patches(index: Tensor) -> Tensor:
        row = (index // side * unit)[..., None, None] + within[:, None]
        column = (index % side * unit)[..., None, None] + within
        return (row * side * unit + column).flatten(1)

    return PatchSplit(patches(split.masked), patches(split.thrown), patches(split.visible))
