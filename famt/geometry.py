"""Where a crop lies in its image, and what a score map of the image says about the crop.

A *view* is a window (top, left, height, width), in fractions of the upright image, and a horizontal
flip. A map is constant on each of its G x G cells over the whole image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop_maps(maps: Tensor, windows: Tensor, flips: Tensor, grid: int) -> Tensor:
    """Exact area mean of each map over every cell of the view laid on it.

    The mean over a rectangle of a map that is constant on cells is separable: `R_y @ M @ R_x.T`,
    with R the share of each output interval that each map cell covers.

    Args:
        maps: `[B, G, G]` float.
        windows: `[B, 4]` top, left, height, width in fractions of the upright image; height and
            width > 0, the window inside [0, 1].
        flips: `[B]` bool, the crop was mirrored left to right.
        grid: cells a side of the result.

    Returns:
        `[B, grid, grid]`, dtype of `maps` if float32 or float64, else float32. The full window
        without flip at `grid == G` is the identity; a constant map stays that constant.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    batch = maps.shape[0]
    if maps.ndim != 3 or windows.shape != (batch, 4) or flips.shape != (batch,):
        raise ValueError(
            "expected maps [B, G, G], windows [B, 4] and flips [B], got "
            f"{list(maps.shape)}, {list(windows.shape)} and {list(flips.shape)}"
        )
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float()
    windows = windows.to(maps.dtype)
    rows = overlap(windows[:, 0], windows[:, 2], grid, maps.shape[1])
    columns = overlap(windows[:, 1], windows[:, 3], grid, maps.shape[2])
    cropped = rows @ maps @ columns.transpose(1, 2)
    return torch.where(flips[:, None, None], cropped.flip(-1), cropped)


def overlap(start: Tensor, length: Tensor, cells: int, map_cells: int) -> Tensor:
    """Share of each of `cells` equal parts of [start, start + length] in each map cell of [0, 1].

    Args:
        start, length: `[B]` float, fractions of the image side.

    Returns:
        `[B, cells, map_cells]`; every row sums to 1.
    """
    edges = torch.arange(cells + 1, device=start.device, dtype=start.dtype) / cells
    edges = (start[:, None] + length[:, None] * edges).clamp(0, 1) * map_cells
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    cell = torch.arange(map_cells, device=start.device, dtype=start.dtype)
    shared = (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp_min(0)
    return shared / shared.sum(-1, keepdim=True)
