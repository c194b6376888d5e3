"""A model's score of every crop: computed for a part of each batch, remembered for the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from famt.device_copies import send
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.options import ROLLING_EVERY
from famt.pipeline.scoring.memory_bank import MapBank


def half_size(image_size: int, patch_size: int) -> int:
    """Half a crop's side in whole patches, px: the size at which crops are scored."""
    return max(1, image_size // 2 // patch_size) * patch_size


class RollingScores:
    """Scores from a bank, in which 1/every of each batch is scored anew, oldest rows first.

    Args:
        bank: of the crops' rows.
        grid: patches a side of a crop.
        score: crops `[B, S, S, 3]` uint8 -> `[B, n**2]` float, >= 0.
        every: see above.
    """

    def __init__(
        self,
        bank: MapBank,
        grid: int,
        score: Callable[[Tensor], Tensor],
        every: int = ROLLING_EVERY,
    ) -> None:
        self._bank, self._grid, self._score, self._every = bank, grid, score, every

    def read(self, crops: CropBatch, step: int) -> Tensor:
        """Scores `[B, grid**2]` float32 on the crops' device; ones for an image not scored yet."""
        scores = self._bank.read(crops, self._grid)
        chosen = self._bank.oldest(crops.rows, -(-len(crops.rows) // self._every))
        seen = crops.take(chosen)
        found = self._score(seen.images)
        side = round(found.shape[1] ** 0.5)
        maps = found.view(-1, 1, side, side)
        if side != self._grid:
            maps = F.interpolate(maps, self._grid, mode="bilinear")
        scores[send(chosen, scores.device)] = maps.flatten(1)
        self._bank.write_later(seen.views, found, step)
        return scores
