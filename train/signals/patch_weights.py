"""From options to signals, and from signals to patch weights."""

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
from famt.train.signals.config import Slot
from famt.train.signals.signal import Context, Signal

Scores = dict[str, tuple[Tensor, float]]
"""Scores `[B, N]` of patches and their exponent in the weight, by the signal's slot."""


def build_signals(config: Pretrain, context: Context) -> list[Signal]:
    """The signals of a run, one for each slot that is not off; raises as `Slot.signal`."""
    return [build_signal(slot, context) for slot in config.slots.values() if not slot.is_off]


def build_signal(slot: Slot, context: Context) -> Signal:
    """The signal of a slot that is not off; raises as `Slot.signal`."""
    signal = slot.signal(slot, context)
    signal.name = slot.name
    return signal


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

    Args:
        config: options of the run.
        signals: its signals.
        epoch, step, progress: its position.
        look: for a picture; see `Signal.look`.
    """
    plain = epoch < config.plain_until
    scores = {} if plain else read_signals(signals, crops, step, look=look)
    # Without scores yet, the run masks as the plain method does.
    join = config.plain if plain or (config.weighs and not scores) else config.join
    return Weighed(crops, scores, weigh(scores, crops, config.sizes.grid), join, progress)


def read_signals(
    signals: Sequence[Signal], crops: CropBatch, step: int, *, look: bool = False
) -> Scores:
    """Scores `[B, N]` and exponent of each signal that has scores; `look` as in `weigh_crops`."""
    scores = {
        each.name: (each.look(crops, step) if look else each.read(crops, step), each)
        for each in signals
    }
    return {
        name: (found, signal.exponent)
        for name, (found, signal) in scores.items()
        if found is not None
    }


def weigh(scores: Scores, crops: CropBatch, grid: int) -> Tensor:
    """Weights `[B, grid**2]` float32: the product of all scores, each divided by its mean over the
    crop and raised to its exponent; ones without scores."""
    if not scores:
        return torch.ones(len(crops.rows), grid**2, device=crops.images.device)
    return patch_weights(
        {name: found for name, (found, _) in scores.items()},
        {name: exponent for name, (_, exponent) in scores.items()},
    )
