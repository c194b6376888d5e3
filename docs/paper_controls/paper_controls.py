"""Two controls for refreshed maps: a gain under them is not due to the content of the maps."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from famt.pipeline.loading.loader import CropBatch
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.signals.refreshed import Refreshed
from famt.train.signals.signal import Context


class TopLeft(Refreshed):
    """The join of the released code: every crop gets the top left corner of its image's map.

    It slices a map of G x G cells by `i // H : (i + h) // H + 2`, where i and h are top and height
    of the crop in an image H px high. i // H is 0, and (i + h) // H is 1 only if the crop reaches
    the lower edge. So two or three cells a side are stretched over every crop.
    """

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        ends = crops.windows[:, :2] + crops.windows[:, 2:]
        cells = 2.0 + (ends > 1 - 1e-6)
        corner = torch.cat([torch.zeros_like(cells), cells / self._maps.grid], dim=1)
        return super().read(dataclasses.replace(crops, windows=corner.clamp_max(1)), step)

    def describe(self) -> str:
        return f"{super().describe()}, its top left corner for every crop"


class OfOthers(Refreshed):
    """The map of another image, always the same one."""

    def __init__(self, slot: FrequencyConfig | AttentionConfig, context: Context) -> None:
        super().__init__(slot, context)
        generator = torch.Generator().manual_seed(context.seed)
        circle = torch.randperm(len(context.samples), generator=generator)
        self._other = torch.empty_like(circle)
        self._other[circle] = circle.roll(1)

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        return super().read(dataclasses.replace(crops, rows=self._other[crops.rows]), step)

    def describe(self) -> str:
        return f"{super().describe()}, of another image"
