"""Exact conversion between maps of whole images and crops of these images.

A *view* is a window (top, left, height, width), in fractions of the upright image, and a horizontal
flip. A map is constant on each of its G x G cells, which cover the whole image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop_maps(maps: Tensor, windows: Tensor, flips: Tensor, grid: int) -> Tensor:
    """Exact area mean of each map over every cell of its view.

    The mean over a rectangle of a map that is constant on cells is separable: `R_y @ M @ R_x.T`,
    with R the share of each output interval that each map cell covers.

    Args:
        maps: `[B, G, G]` float.
        windows: `[B, 4]` top, left, height, width in fractions of the upright image, inside [0, 1]
            with height and width > 0.
        flips: `[B]` bool, the crop is mirrored left to right.
        grid: cells a side of the result.

    Returns:
        `[B, grid, grid]`, dtype of `maps` if float32 or float64, else float32. The full window
        without flip at `grid == G` is the identity; a constant map stays that constant.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    maps = _checked(windows, flips, maps)
    windows = windows.to(maps.dtype)
    rows = overlap(windows[:, 0], windows[:, 2], grid, maps.shape[1])
    columns = overlap(windows[:, 1], windows[:, 3], grid, maps.shape[2])
    cropped = rows @ maps @ columns.transpose(1, 2)
    return torch.where(flips[:, None, None], cropped.flip(-1), cropped)


def paste_maps(
    maps: Tensor, crops: Tensor, windows: Tensor, flips: Tensor, known: Tensor | None = None
) -> Tensor:
    """Write values of crops back into the maps of their images.

    The transpose of `crop_maps`: a cell of the map takes the crop's mean over the part covered by
    the view, and keeps its own value for the rest.

    Args:
        maps: `[B, G, G]` float, the current maps.
        crops: `[B, n, n]` float, values in the cells of the view.
        windows, flips: the views, as in `crop_maps`.
        known: `[B, n, n]` bool, cells of the view that have a value; all if left out.

    Returns:
        `[B, G, G]` float32, or float64 if `maps` is. A crop of the full window without flip at
        `n == G` replaces the map; a map pasted with its own constant stays as it is.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    maps = _checked(windows, flips, maps, crops)
    crops, windows = crops.to(maps.dtype), windows.to(maps.dtype)
    upright = torch.where(flips[:, None, None], crops.flip(-1), crops)
    rows = _shared(windows[:, 0], windows[:, 2], crops.shape[1], maps.shape[1]).transpose(1, 2)
    columns = _shared(windows[:, 1], windows[:, 3], crops.shape[2], maps.shape[2])
    if known is None:
        covered = rows.sum(2, keepdim=True) * columns.sum(1, keepdim=True)  # [B, G, G], 0 to 1
        return maps * (1 - covered) + rows @ upright @ columns
    seen = torch.where(flips[:, None, None], known.flip(-1), known).to(maps.dtype)
    return maps * (1 - rows @ seen @ columns) + rows @ (upright * seen) @ columns


def crop_labels(labels: Tensor, window: Tensor, flip: bool, size: int) -> Tensor:
    """Cut a mask of a whole image by a view.

    Each pixel of the crop takes the label under its centre; labels are never mixed.

    Args:
        labels: `[H, W]` of any dtype, over the whole upright image, at any resolution.
        window: `[4]` float, top, left, height, width in fractions of the image.
        flip: the crop is mirrored left to right.
        size: side of the result.

    Returns:
        `[size, size]`, dtype of `labels`. The full window without flip at H = W = size is the
        identity.
    """
    top, left, height, width = window.double().tolist()
    centres = (torch.arange(size, dtype=torch.float64, device=labels.device) + 0.5) / size
    rows = ((top + height * centres) * labels.shape[0]).long().clamp_(0, labels.shape[0] - 1)
    columns = ((left + width * centres) * labels.shape[1]).long().clamp_(0, labels.shape[1] - 1)
    return labels[rows][:, columns.flip(0) if flip else columns]


def overlap(start: Tensor, length: Tensor, cells: int, map_cells: int) -> Tensor:
    """Share of each of `cells` equal parts of [start, start + length] in each map cell of [0, 1].

    Args:
        start, length: `[B]` float, fractions of the image side.

    Returns:
        `[B, cells, map_cells]`; every row sums to 1.
    """
    shared = _shared(start, length, cells, map_cells)
    return shared / shared.sum(-1, keepdim=True)


def _shared(start: Tensor, length: Tensor, cells: int, map_cells: int) -> Tensor:
    """Length shared by each part and each map cell, in map cells: `[B, cells, map_cells]`."""
    edges = torch.arange(cells + 1, device=start.device, dtype=start.dtype) / cells
    edges = (start[:, None] + length[:, None] * edges).clamp(0, 1) * map_cells
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    cell = torch.arange(map_cells, device=start.device, dtype=start.dtype)
    return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp_min(0)


def _checked(windows: Tensor, flips: Tensor, *maps: Tensor) -> Tensor:
    """The first of the maps, as float32 unless it is float64."""
    batch = len(maps[0])
    fit = all(each.ndim == 3 and len(each) == batch for each in maps)
    if not fit or windows.shape != (batch, 4) or flips.shape != (batch,):
        shapes = [list(each.shape) for each in (*maps, windows, flips)]
        raise ValueError(
            "expected maps (and crops) [B, n, n], windows [B, 4] and flips [B], got "
            f"{', '.join(map(str, shapes))}"
        )
    return maps[0] if maps[0].dtype == torch.float64 else maps[0].float()
