"""Masks by green noise, which know nothing of the image, as a signal of FAMT."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.loader import CropBatch
from train.signals.config import FrequencyConfig
from train.signals.signal import Context, Signal

_FINE, _COARSE = 0.5, 2.0  # deviations of the two blurs, patches


class GreenNoise(Signal):
    """White noise blurred by one Gaussian, less the same noise blurred by a wider one.

    Hinojosa et al., "ColorMAE", ECCV 2024, arXiv 2407.13036: masked patches come in small groups.
    Scores are `exp` of the noise, at mean 0 and deviation 1 in each crop.
    """

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        self.exponent, self._grid = slot.exponent, context.grid
        self._seed, self._ranks = context.config.seed, context.ranks
        along = torch.fft.fftfreq(2 * self._grid) ** 2  # twice the grid: its ends are no neighbours
        square = -2 * torch.pi**2 * (along[:, None] + along[None, :])
        self._gain = torch.exp(square * _FINE**2) - torch.exp(square * _COARSE**2)

    def read(self, crops: CropBatch, step: int) -> Tensor:
        run = 1_000_003 * self._seed + step  # a resumed run draws the same again
        seed = run * self._ranks.world_size + self._ranks.rank
        white = torch.randn(
            len(crops.rows), *self._gain.shape, generator=torch.Generator().manual_seed(seed)
        )
        noise = torch.fft.ifft2(torch.fft.fft2(white) * self._gain).real
        noise = noise[:, : self._grid, : self._grid].flatten(1)
        noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
        return noise.exp().to(crops.images.device)
