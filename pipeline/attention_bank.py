"""What the encoder last attended to in every image, kept in the frame of the whole image.

A crop's attention is written back through the inverse of its view, and any later crop of the image
reads it through its own. So one refresh serves many epochs, however the crops fall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from famt.geometry import crop_maps, paste_maps
from pipeline.join import crop_scores
from pipeline.loader import CropBatch

_NEVER = -1


class AttentionBank:
    """An attention map for every row of a `SampleTable`.

    A crop tells how its patches compare with one another, not with the rest of the image. So what
    is written is scaled to the mean that the bank has in that window, and the mean of a map over
    its whole image stays 1.

    Attributes:
        maps: `[R, G, G]` float16, mean 1 an image; all ones for a row that was never seen.
        refreshed: `[R]` int32, the step of a row's last refresh, -1 for never.
    """

    def __init__(self, rows: int, grid: int) -> None:
        self.maps = torch.ones(rows, grid, grid, dtype=torch.float16)
        self.refreshed = torch.full((rows,), _NEVER, dtype=torch.int32)
        self._told = 0  # other banks know what was refreshed before this step

    def oldest(self, rows: Tensor, count: int) -> Tensor:
        """Positions in `rows [B]` of the `count` longest without a refresh, `[count]` int64."""
        return self.refreshed[rows].argsort(stable=True)[:count]

    def read(self, crops: CropBatch, grid: int) -> Tensor:
        """Attention of crops, `[B, grid**2]` float32 on their device, >= 0; ones if never seen."""
        return crop_scores(self.maps, crops, grid)

    def write(self, crops: CropBatch, scores: Tensor, step: int) -> None:
        """Take up what the encoder attends to in crops.

        Args:
            crops: of rows that are each there once.
            scores: `[B, n**2]` float on the CPU, >= 0, any scale; a crop with a score that is not
                finite, or with none above 0, says nothing and is left out.
            step: of the run, now.
        """
        seen = scores.float().flatten(1)
        mean = seen.mean(1)
        valid = seen.isfinite().all(1) & (mean > 0)
        rows, windows, flips = (p[valid] for p in (crops.rows, crops.windows, crops.flips))
        side = round(scores.shape[1] ** 0.5)
        relative = (seen[valid] / mean[valid, None]).unflatten(1, (side, side))
        maps = self.maps[rows]
        level = crop_maps(maps, windows, flips, 1)  # [B, 1, 1]
        pasted = paste_maps(maps, relative * level, windows, flips)
        self.maps[rows] = (pasted / pasted.mean((1, 2), keepdim=True)).half()
        self.refreshed[rows] = step

    def news(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows refreshed since the last news, their maps and steps: what other banks `merge`."""
        rows = (self.refreshed >= self._told).nonzero().flatten()
        self._told = self._next_step()
        return rows, self.maps[rows], self.refreshed[rows]

    def merge(self, rows: Tensor, maps: Tensor, refreshed: Tensor) -> None:
        """Take over another bank's `news`, but for rows that this bank refreshed later."""
        newer = refreshed > self.refreshed[rows]
        rows = rows[newer]
        self.maps[rows] = maps[newer]
        self.refreshed[rows] = refreshed[newer]
        self._told = self._next_step()

    def state(self) -> dict[str, Tensor]:
        """All that the bank holds."""
        return {"maps": self.maps, "refreshed": self.refreshed}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of a bank of as many rows said, in place."""
        self.maps.copy_(state["maps"])
        self.refreshed.copy_(state["refreshed"])
        self._told = self._next_step()

    @property
    def coverage(self) -> float:
        """Share of the rows that were ever seen."""
        return (self.refreshed != _NEVER).float().mean().item()

    def _next_step(self) -> int:
        return int(self.refreshed.max()) + 1
