"""What was last seen of every image, kept in the frame of the whole image.

What a crop says of its patches is written back through the inverse of its view, and any later crop
of the image reads it through its own. So one look serves many epochs, however the crops fall.
"""

from __future__ import annotations

import torch
from torch import Tensor

from famt.geometry import crop_maps, paste_maps
from famt.pipeline.loader import CropBatch, Views
from famt.pipeline.masking import crop_scores

_NEVER = -1


class MapBank:
    """A map for every row of a `SampleTable`.

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
        """Positions in `rows [B]` of the `count` longest without a refresh, `[count]` int64.

        Of a row that is there several times, another place counts only after all rows had one.
        """
        by_age = self.refreshed[rows].argsort(stable=True)
        return by_age[_turns(rows)[by_age].argsort(stable=True)][:count]

    def read(self, crops: CropBatch, grid: int) -> Tensor:
        """Crops' parts of it, `[B, grid**2]` float32 on their device, >= 0; ones if never seen."""
        return crop_scores(self.maps, crops, grid)

    def write(self, views: Views, scores: Tensor, step: int, known: Tensor | None = None) -> None:
        """Take up what crops say of their patches.

        Several crops of one row are taken up one after the other, as they stand: where they
        overlap, the last one counts.

        Args:
            views: of any rows.
            scores: `[B, n**2]` float on the CPU, >= 0, any scale; a crop with a known score that is
                not finite, or with none above 0, says nothing and is left out.
            step: of the run, now.
            known: `[B, n**2]` bool on the CPU, the patches that have a score; all if left out. The
                others leave the map as it is.
        """
        turns = _turns(views.rows)
        if turns.any():
            for turn in range(int(turns.max()) + 1):
                now = turns == turn
                of_known = None if known is None else known[now]
                self.write(views.take(now), scores[now], step, of_known)
            return
        seen = scores.float().flatten(1)
        side = round(seen.shape[1] ** 0.5)
        if known is None:
            mean = seen.mean(1)
        else:
            seen = seen.where(known, 0.0)
            mean = seen.sum(1) / known.sum(1).clamp_min(1)
        valid = seen.isfinite().all(1) & (mean > 0)
        views = views.take(valid)
        relative = (seen[valid] / mean[valid, None]).unflatten(1, (side, side))
        maps = self.maps[views.rows]
        if known is None:
            level = crop_maps(maps, views.windows, views.flips, 1)  # [B, 1, 1]
            pasted = paste_maps(maps, relative * level, views.windows, views.flips)
        else:
            cells = known[valid].unflatten(1, (side, side))
            before = crop_maps(maps, views.windows, views.flips, side) * cells
            level = before.sum((1, 2), keepdim=True) / cells.sum((1, 2), keepdim=True)
            pasted = paste_maps(maps, relative * level, views.windows, views.flips, cells)
        self.maps[views.rows] = (pasted / pasted.mean((1, 2), keepdim=True)).half()
        self.refreshed[views.rows] = step

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

    def state_dict(self) -> dict[str, Tensor]:
        """All that the bank holds."""
        return {"maps": self.maps, "refreshed": self.refreshed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` of a bank of as many rows said, in place."""
        self.maps.copy_(state["maps"])
        self.refreshed.copy_(state["refreshed"])
        self._told = self._next_step()

    @property
    def coverage(self) -> float:
        """Share of the rows that were ever seen."""
        return (self.refreshed != _NEVER).float().mean().item()

    def _next_step(self) -> int:
        return int(self.refreshed.max()) + 1


def _turns(rows: Tensor) -> Tensor:
    """How often the same row stands before each place of `rows [B]`: `[B]` int64."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    turns = torch.empty_like(rows)
    turns[order] = torch.arange(len(rows)) - torch.searchsorted(ordered, ordered)
    return turns
