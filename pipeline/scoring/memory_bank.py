"""Remembered scores of every image, in the frame of the whole image.

Scores of a crop are written through the inverse of its view, and later crops read them through
their own views: one look at an image serves many epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from famt.device_copies import Fetched
from famt.geometry import crop_maps, paste_maps
from famt.pipeline.loading.loader import CropBatch, Views
from famt.pipeline.loading.masking import crop_scores

_NEVER = -1


class MapBank:
    """A map for every row of a `SampleTable`.

    Scores of a crop compare its patches with one another, not with the rest of the image. So they
    are scaled to the bank's mean in that window, and the mean of a map stays 1.

    Attributes:
        maps: `[R, G, G]` float16, mean 1 an image; ones for a row never written.
        written_at: `[R]` int32, step at which a row was last written, -1 for never.
    """

    def __init__(self, rows: int, grid: int) -> None:
        self.maps = torch.ones(rows, grid, grid, dtype=torch.float16)
        self.written_at = torch.full((rows,), _NEVER, dtype=torch.int32)
        self._synced = 0  # other banks have all rows written before this step
        self._later: tuple[Views, Fetched, int, Fetched | None] | None = None

    def oldest(self, rows: Tensor, count: int) -> Tensor:
        """Positions in `rows [B]` of the `count` rows written longest ago, `[count]` int64.

        If rows repeat, every row comes once before any row comes twice.
        """
        by_age = self.written_at[rows].argsort(stable=True)
        return by_age[_turns(rows)[by_age].argsort(stable=True)][:count]

    def read(self, crops: CropBatch, grid: int) -> Tensor:
        """Scores of crops, `[B, grid**2]` float32 on their device, >= 0; ones if never written."""
        self.flush()
        return crop_scores(self.maps, crops, grid)

    def write_later(
        self, views: Views, scores: Tensor, step: int, known: Tensor | None = None
    ) -> None:
        """As `write`, of scores on any device, when something is read, or written later, next: they
        are copied from a GPU meanwhile."""
        self.flush()
        self._later = (views, Fetched(scores), step, None if known is None else Fetched(known))

    def flush(self) -> None:
        """Write now what is left to write later."""
        if self._later is not None:
            views, scores, step, known = self._later
            self._later = None
            self.write(views, scores.get(), step, None if known is None else known.get())

    def write(self, views: Views, scores: Tensor, step: int, known: Tensor | None = None) -> None:
        """Write scores of crops into the maps of their rows.

        Several crops of one row are written in order: where they overlap, the last one counts.

        Args:
            views: of the crops; rows may repeat.
            scores: `[B, n**2]` float on the CPU, >= 0, any scale. Crops with a known score that is
                not finite, or with none above 0, are left out.
            step: current step of the run.
            known: `[B, n**2]` bool on the CPU, the patches that have a score; all if left out. The
                map stays as it is under the others.
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
        self.written_at[views.rows] = step

    def news(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows written since the last sync, their maps and steps, for other banks to `merge`."""
        rows = (self.written_at >= self._synced).nonzero().flatten()
        self._synced = self._next_step()
        return rows, self.maps[rows], self.written_at[rows]

    def merge(self, rows: Tensor, maps: Tensor, written_at: Tensor) -> None:
        """Take over another bank's `news`, except rows that this bank wrote later."""
        newer = written_at > self.written_at[rows]
        rows = rows[newer]
        self.maps[rows] = maps[newer]
        self.written_at[rows] = written_at[newer]
        self._synced = self._next_step()

    def state_dict(self) -> dict[str, Tensor]:
        """All that the bank holds."""
        return {"maps": self.maps, "refreshed": self.written_at}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the state of a bank of equal size, in place."""
        self.maps.copy_(state["maps"])
        self.written_at.copy_(state["refreshed"])
        self._synced = self._next_step()

    @property
    def coverage(self) -> float:
        """Share of the rows ever written."""
        return (self.written_at != _NEVER).float().mean().item()

    def _next_step(self) -> int:
        return int(self.written_at.max()) + 1


def _turns(rows: Tensor) -> Tensor:
    """How often each row occurs before its position in `rows [B]`: `[B]` int64."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    turns = torch.empty_like(rows)
    turns[order] = torch.arange(len(rows)) - torch.searchsorted(ordered, ordered)
    return turns
