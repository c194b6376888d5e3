"""How well maps tell objects from background."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from famt.frequency import pixel_frequency
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.kinds import PIXEL_KINDS
from famt.pipeline.options import Checked
from famt.pipeline.scores import ScoreSpec


@dataclass(frozen=True)
class Quality(Checked):
    """How well each kind of map tells objects from background, without any learning.

    Area under the ROC curve of a 14 x 14 map against object masks, mean over photos. Beside each
    figure: the same maps laid on other photos' masks (`elsewhere`), which shows how much of it is
    just where photographers put their objects; the difference, which a map knows of its own image;
    the time of a core an image; and a centred Gaussian that looks at no image.
    """

    photos: Path
    """folder of photos"""
    masks: Path
    """folder of masks of the same names: white where the object is"""
    grid: Annotated[int, Ge(2)] = 14
    """cells a side"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        spec = ScoreSpec(grid=self.grid)
        images, truths = [], []
        masks = {path.stem: path for path in self.masks.iterdir()}
        for photo in tqdm(sorted(self.photos.iterdir()), desc="photos"):
            truth = _object_cells(masks[photo.stem], self.grid)
            if truth.any() and not truth.all():
                size = (spec.size, spec.size)
                with Image.open(photo) as image:
                    squashed = image.convert("RGB").resize(size, Image.Resampling.BOX)
                images.append(torch.from_numpy(np.array(squashed)))
                truths.append(truth)
        pixels = torch.stack(images).permute(0, 3, 1, 2) / 255
        axis = torch.linspace(-1, 1, self.grid)
        gaussian = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.5**2)).expand(
            len(pixels), -1, -1
        )
        baseline = _auc(gaussian, truths)
        for kind in PIXEL_KINDS:
            started = time.process_time()
            maps = pixel_frequency(pixels, self.grid, kind)
            taken = time.process_time() - started
            auc, elsewhere = (_auc(each, truths) for each in (maps, maps.roll(len(maps) // 3, 0)))
            yield {
                **measure.line("quality", f"AUC of {kind}", auc, "centred Gaussian", baseline),
                "elsewhere": round(elsewhere, 4),
                "difference": round(auc - elsewhere, 4),
                "ms_of_a_core": round(1000 * taken / len(maps), 3),
                "photos": len(maps),
            }


def _object_cells(path: Path, grid: int) -> torch.Tensor:
    """`[grid * grid]` bool: cells that the object covers by more than half."""
    with Image.open(path) as mask:
        cells = mask.convert("L").resize((grid * 16, grid * 16), Image.Resampling.BOX)
    share = np.asarray(cells, np.float32).reshape(grid, 16, grid, 16).mean((1, 3)) / 255
    return torch.from_numpy(share.flatten() > 0.5)


def _auc(maps: torch.Tensor, truths: list[torch.Tensor]) -> float:
    """Mean over photos of the chance that an object cell outscores a background cell."""
    return statistics.mean(
        float(roc_auc_score(truth.numpy(), scores.flatten().numpy()))
        for scores, truth in zip(maps, truths, strict=True)
    )
