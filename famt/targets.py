"""Images to predict in place of those that the encoder sees."""

from __future__ import annotations

import torch
from torch import Tensor


def low_pass(images: Tensor, radius: float) -> Tensor:
    """Ideal low-pass of images, as for PixMIM's targets.

    Liu et al., "PixMIM: Rethinking Pixel Reconstruction in Masked Image Modeling" (arXiv
    2303.02416), section 3: keep frequencies within a circle, drop all others. The paper's radius is
    40 for 224-px images. The circle is centred on frequency 0; in the paper's code it is off by
    half a cycle.

    Args:
        images: `[B, H, W, C]`, any dtype.
        radius: highest frequency kept, cycles per image side; 0 leaves the mean colour.

    Returns:
        `[B, H, W, C]` float32 on the scale of `images`; edges may ring slightly beyond its range.
    """
    height, width = images.shape[1:3]
    down = torch.fft.fftfreq(height, 1 / height, device=images.device)
    across = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    kept = down[:, None] ** 2 + across**2 <= radius**2
    spectrum = torch.fft.rfft2(images.float(), dim=(1, 2)) * kept[..., None]
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2))
