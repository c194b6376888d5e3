"""Images that a model is to predict in place of the ones that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def low_pass(images: Tensor, radius: float) -> Tensor:
    """Images without their finest detail: an ideal low-pass, as PixMIM's targets are made.

    Liu et al., "PixMIM: Rethinking Pixel Reconstruction in Masked Image Modeling" (arXiv
    2303.02416), section 3: every frequency within a circle stays as it is, all others go. The paper
    takes a radius of 40 for 224-px images. Frequencies are whole numbers of waves here, so that the
    circle lies around frequency 0; the paper's code has it half a wave beside.

    Args:
        images: `[B, H, W, C]`, any dtype.
        radius: largest frequency that stays, waves an image side; at 0 the mean colour is left.

    Returns:
        `[B, H, W, C]` float32 on the scale of `images`; edges may ring a little beyond its range.
    """
    height, width = images.shape[1:3]
    down = torch.fft.fftfreq(height, 1 / height, device=images.device)
    across = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    kept = down[:, None] ** 2 + across**2 <= radius**2
    spectrum = torch.fft.rfft2(images.float(), dim=(1, 2)) * kept[..., None]
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2))
