"""Masks in small groups, from green noise as in ColorMAE (arXiv 2407.13036)."""

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from famt.pipeline.loading.loader import CropBatch
from famt.train.signals.config import FrequencyConfig
from famt.train.signals.signal import Context, Signal

NARROW, WIDE, MARGIN = 0.5, 2.0, 6  # deviations of two Gaussians, and their reach, in patches


class GreenNoise(Signal):
    """Band-passed white noise, new for every crop, independent of its content."""

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        self.exponent, self._grid = slot.exponent, context.grid
        self._seed, self._rank = context.seed, context.ranks.rank

    def read(self, crops: CropBatch, step: int) -> Tensor:
        seed = hash((self._seed, self._rank, step)) % 2**63
        side, reach = self._grid + 2 * MARGIN, 2 * MARGIN + 1
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(len(crops.rows), side, side, generator=generator)
        green = gaussian_blur(white, reach, NARROW) - gaussian_blur(white, reach, WIDE)
        inner = green[:, MARGIN:-MARGIN, MARGIN:-MARGIN].flatten(1)
        # So steep that the draw by weight nearly sorts.
        return torch.exp(10 * inner / inner.std(1, keepdim=True)).to(crops.images.device)
