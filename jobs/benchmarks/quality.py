"""How well score maps separate objects from background."""

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

from famt.frequency import pixel_frequency
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.pipeline.options import Checked
from famt.pipeline.progress import progress_bar
from famt.pipeline.scores import ScoreSpec
from famt.pixel_kinds import PIXEL_KINDS


@dataclass(frozen=True)
class Quality(Checked):
    """How well each kind of score separates objects from background, without any training.

    The figure is the area under the ROC curve of a map against an object mask, averaged over
    photos; the bound is that of a centred Gaussian, which sees no image. `elsewhere` pairs each map
    with another photo's mask, which measures where photographers put objects; `difference` is what
    the map knows of its own image.
    """

    photos: Path
    """folder of photos"""
    masks: Path
    """folder of masks with the same names, white on the object"""
    grid: Annotated[int, Ge(2)] = 14
    """cells a side"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        size = ScoreSpec(grid=self.grid).size
        images, truths = [], []
        masks = {path.stem: path for path in self.masks.iterdir()}
        for photo in progress_bar(sorted(self.photos.iterdir()), desc="photos"):
            mask = _resized(masks[photo.stem], "L", self.grid)
            truth = mask.flatten() > 127.5  # more than half covered by the object
            if truth.any() and not truth.all():
                images.append(torch.from_numpy(_resized(photo, "RGB", size)))
                truths.append(truth)
        pixels = torch.stack(images).permute(0, 3, 1, 2) / 255
        axis = torch.linspace(-1, 1, self.grid)
        gaussian = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.5**2))
        baseline = _auc(gaussian.expand(len(pixels), -1, -1), truths)
        for kind in PIXEL_KINDS:
            started = time.process_time()
            maps = pixel_frequency(pixels, self.grid, kind)
            seconds = time.process_time() - started
            auc, elsewhere = (_auc(each, truths) for each in (maps, maps.roll(len(maps) // 3, 0)))
            yield {
                **measure.line("quality", f"AUC of {kind}", auc, "centred Gaussian", baseline),
                "elsewhere": round(elsewhere, 4),
                "difference": round(auc - elsewhere, 4),
                "ms_of_a_core": round(1000 * seconds / len(maps), 3),
                "photos": len(maps),
            }


def _resized(path: Path, mode: str, size: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert(mode).resize((size, size), Image.Resampling.BOX))


def _auc(maps: torch.Tensor, truths: list[np.ndarray]) -> float:
    """Probability that an object cell outscores a background cell, mean over photos."""
    return statistics.mean(
        float(roc_auc_score(truth, scores.flatten().numpy()))
        for scores, truth in zip(maps, truths, strict=True)
    )
