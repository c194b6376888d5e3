"""Crop and resize images in memory by two small matrix products a crop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def resample(
    images: Tensor,
    extents: Tensor,
    windows: Tensor,
    flips: Tensor,
    size: int,
    interpolation: str = "bicubic",
) -> Tensor:
    """Crops of images, resized with antialiasing as Pillow resizes a cropped image.

    A resize is linear and separable: `R_y @ image @ R_x.T` for each channel, with R the weights of
    input pixels for each output pixel. The filter widens where a crop is shrunk.

    Args:
        images: `[B, 3, H, W]` uint8; pixels beyond an image's extent are not read.
        extents: `[B, 2]` height and width of each image, px.
        windows: `[B, 4]` float, top, left, height and width in fractions of the image.
        flips: `[B]` bool, mirror the crop left to right.
        size: side of the crops, px.
        interpolation: "bicubic" (a = -0.5) or "bilinear" (a triangle).

    Returns:
        `[B, size, size, 3]` uint8.
    """
    place = (windows * extents.repeat(1, 2)).unflatten(1, (2, 2))  # [B, start and length, y and x]
    start, length = place.permute(1, 2, 0).flatten(1)
    weights = _weights(start, length, size, max(images.shape[2:]), _FILTERS[interpolation])
    down, across = weights.unflatten(0, (2, -1, 1))
    down, across = down[..., : images.shape[2]], across[..., : images.shape[3]]
    across = torch.where(flips[:, None, None, None], across.flip(2), across)
    crops = down @ images.float() @ across.transpose(2, 3)
    return crops.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def _weights(
    start: Tensor, length: Tensor, size: int, pixels: int, kernel: Callable[[Tensor], Tensor]
) -> Tensor:
    """Weights of input pixels along one side for each of `size` output pixels.

    Args:
        start, length: `[B]` px, of the crop.

    Returns:
        `[B, size, pixels]` float32; rows sum to 1, pixels outside the crop weigh 0.
    """
    outputs = (torch.arange(size, device=start.device) + 0.5) / size
    pixel = torch.arange(pixels, device=start.device) + 0.5
    centre = start[:, None] + length[:, None] * outputs
    scale = (length / size).clamp_min(1)
    distance = pixel / scale[:, None, None] - (centre / scale[:, None])[..., None]
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weights = kernel(distance.abs_()) * inside[:, None]
    return weights.div_(weights.sum(2, keepdim=True))


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution, a = -0.5 (IEEE TASSP 29(6), 1981), of distances x >= 0.

    With u = max(2 - x, 0) and v = max(1 - x, 0) its two pieces are one polynomial.
    """
    u = (2 - x).clamp_min_(0)
    less = u - 1
    v = less.clamp_min(0)
    return (u * u).mul_(less).mul_(0.5).add_((v * v).mul_(1 - 2 * v))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp_min(0)


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bicubic": _cubic, "bilinear": _triangle}
