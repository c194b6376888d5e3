"""The pixel score of every image, computed before training and read from the cache."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.loading.masking import crop_scores
from famt.train.signals.config import FrequencyConfig
from famt.train.signals.signal import Context, Signal


class Cached(Signal):
    """Maps of the pixel score (`--spec`), shared by the ranks of a machine."""

    reads_cache = True

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        self.exponent, self._grid = slot.cached_exponent, context.grid
        self._maps, self._score = context.ranks.share(context.cached), context.score

    def read(self, crops: CropBatch, step: int) -> Tensor:
        return crop_scores(self._maps, crops, self._grid)

    def describe(self) -> str:
        return f"cached {self._score} to the power {self.exponent:g}"


class CachedOfOthers(Cached):
    """A control: each image gets the map of another image, always the same one.

    Gains that this also shows do not come from what the maps say about the images.
    """

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        super().__init__(slot, context)
        generator = torch.Generator().manual_seed(context.seed)
        circle = torch.randperm(len(context.samples), generator=generator)
        self._other = torch.empty_like(circle)
        self._other[circle] = circle.roll(1)

    def read(self, crops: CropBatch, step: int) -> Tensor:
        others = self._other[crops.rows.cpu()]
        return super().read(dataclasses.replace(crops, rows=others), step)

    def describe(self) -> str:
        return f"{super().describe()}, of another image"
