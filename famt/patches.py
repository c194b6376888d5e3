"""Cut images into patches of raw pixels, all or some.

A patch is flattened row by row, channels last: the order of MAE's targets, and of an interleaved
image in memory.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Interleaved images `[B, H, W, C]` to patches `[B, N, patch_size**2 * C]`, in raster order.

    Raises:
        ValueError: height or width is no multiple of `patch_size`.
    """
    down, across = _grid(images, patch_size)
    batch, channels = images.shape[0], images.shape[3]
    cells = images.reshape(batch, down, patch_size, across, patch_size * channels)
    return cells.transpose(2, 3).reshape(batch, down * across, -1)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Inverse of `patchify` for square images: `[B, N, patch_size**2 * C]` -> `[B, H, W, C]`."""
    batch, count, values = patches.shape
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} patches make no square image")
    cells = patches.view(batch, side, side, patch_size, patch_size, values // patch_size**2)
    return cells.transpose(2, 3).reshape(batch, side * patch_size, side * patch_size, -1)


def gather_patches(images: Tensor, index: Tensor, patch_size: int) -> Tensor:
    """Copy the patches at raster positions `index`.

    Args:
        images: `[B, H, W, C]` interleaved, any dtype.
        index: `[B, K]` int64.

    Returns:
        `[B, K, patch_size**2 * C]`, dtype of `images`.
    """
    batch, height, _, channels = images.shape
    down, across = _grid(images, patch_size)
    # A line of a patch is contiguous, so whole lines are copied, at the speed of memory.
    lines = images.reshape(batch * height * across, patch_size * channels)
    first = torch.arange(batch, device=index.device)[:, None] * down + index // across
    line = torch.arange(patch_size, device=index.device) + first[..., None] * patch_size
    line = line * across + (index % across)[..., None]
    return lines.index_select(0, line.flatten()).view(*index.shape, -1)


def normalise(patches: Tensor) -> Tensor:
    """RGB patches `[B, K, P*P*3]`, 0 to 255, to float32, normalised by ImageNet's moments."""
    factor, offset = _normalisation(patches.shape[-1] // 3, patches.device)
    return patches.to(torch.float32, copy=True).mul_(factor).sub_(offset)


def normalise_images(images: Tensor) -> Tensor:
    """uint8 images `[B, H, W, 3]` to an encoder's input, normalised float32 `[B, 3, H, W]`."""
    return normalise(images.flatten(2)).unflatten(-1, (-1, 3)).permute(0, 3, 1, 2).contiguous()


@cache  # sending a constant to a GPU makes the host wait
def _normalisation(pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and offset for the values of so many pixels."""
    with torch.inference_mode(False):
        mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        both = 1 / (255 * deviation), mean / deviation
        factor, offset = (each.repeat(pixels).to(device) for each in both)
    return factor, offset


def _grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in `[B, H, W, C]`."""
    height, width = images.shape[1:3]
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height} x {width} px is not divisible into patches of {patch_size} px")
    return height // patch_size, width // patch_size
