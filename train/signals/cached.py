"""The pixel score of every image, computed ahead and read from the cache."""

from __future__ import annotations

from torch import Tensor

from pipeline.join import crop_scores
from pipeline.loader import CropBatch
from pipeline.table import load_maps
from train.signals.config import ContentConfig
from train.signals.signal import Context, Signal


class Cached(Signal):
    """Maps of `--spec`, once in the RAM of each machine."""

    def __init__(self, slot: ContentConfig, context: Context) -> None:
        self.exponent, self._grid = slot.cached_exponent, context.grid
        self._spec = context.config.spec
        self._maps = context.here.share(
            lambda: load_maps(context.samples, context.cache, self._spec)
        )

    def read(self, crops: CropBatch, step: int) -> Tensor:
        return crop_scores(self._maps, crops, self._grid)

    def describe(self) -> str:
        return f"cached {self._spec.id} to the power {self.exponent:g}"
