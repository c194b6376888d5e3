"""From signals to patch weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from famt.models import PatchConfig
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.loading.masking import PatchBatch, split_crops
from famt.pipeline.options import JoinConfig
from famt.sampling import patch_weights
from famt.train.config import Pretrain
from famt.train.signals.signal import Signal

Scores = dict[str, tuple[Tensor, float]]
"""Scores `[B, N]` of patches and their exponent in the weight, by the signal's slot."""


@dataclass(frozen=True)
class Weighed:
    """Crops with weights, ready for drawing patches.

    Attributes:
        crops: `[B]`.
        scores: of the signals that have scores yet.
        weights: `[B, N]` float32.
        join: how to draw; plain while the signals have no scores.
        progress: share of the run's steps done, in [0, 1].
    """

    crops: CropBatch
    scores: Scores
    weights: Tensor
    join: JoinConfig
    progress: float

    def split(self, sizes: PatchConfig, generator: torch.Generator) -> PatchBatch:
        """Draw the patches and gather the visible and the predicted ones."""
        return split_crops(self.crops, self.weights, sizes, self.join, generator, self.progress)


def weigh_crops(
    config: Pretrain,
    signals: Sequence[Signal],
    crops: CropBatch,
    *,
    epoch: int,
    step: int,
    progress: float,
    look: bool = False,
) -> Weighed:
    """Weights of the patches of crops, for a step of a run or for a picture.

    A weight is the product of all scores, each divided by its mean over the crop and raised to its
    exponent; 1 without scores.

    Args:
        config: options of the run.
        signals: its signals.
        epoch, step, progress: its position.
        look: for a picture; see `Signal.look`.
    """
    plain = epoch < config.plain_until
    scores: Scores = {}
    for signal in () if plain else signals:
        found = signal.look(crops, step) if look else signal.read(crops, step)
        if found is not None:
            scores[signal.name] = found, signal.exponent
    # Without scores yet, the run masks as the plain method does.
    join = config.plain if plain or (config.weighs and not scores) else config.join
    if scores:
        by_name = {name: each for name, (each, _) in scores.items()}
        weights = patch_weights(by_name, {name: power for name, (_, power) in scores.items()})
    else:
        shape = len(crops.rows), config.sizes.grid**2
        weights = torch.ones(shape, device=crops.images.device)
    return Weighed(crops, scores, weights, join, progress)
