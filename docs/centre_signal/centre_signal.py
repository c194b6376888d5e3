"""A custom signal: patches near the centre of the image weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from famt.pipeline.loading.loader import CropBatch
from famt.train.signals.config import FrequencyConfig
from famt.train.signals.signal import Context, Signal


class Centre(Signal):
    """A Gaussian around the centre of the image, for any crop."""

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        self.exponent, self._grid = slot.exponent, context.grid
        self._read = 0

    def read(self, crops: CropBatch, step: int) -> Tensor:
        self._read += len(crops.rows)
        cells = (torch.arange(self._grid) + 0.5) / self._grid
        y = crops.windows[:, :1] + cells * crops.windows[:, 2:3] - 0.5
        across = torch.where(crops.flips[:, None], cells.flip(0), cells)
        x = crops.windows[:, 1:2] + across * crops.windows[:, 3:] - 0.5
        scores = torch.exp(-(y[:, :, None] ** 2 + x[:, None, :] ** 2) / 0.08)
        return scores.flatten(1).to(crops.images.device)

    def scalars(self) -> dict[str, float]:
        return {f"{self.name}_crops_read": self._read}
