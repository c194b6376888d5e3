"""From the options of a run to its signals, and from signals to the weights of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from famt.models import PatchConfig
from famt.pipeline.loader import CropBatch
from famt.pipeline.masking import PatchBatch, split_crops
from famt.pipeline.options import JoinConfig
from famt.pipeline.plugins import find_plugin
from famt.sampling import patch_weights
from famt.train.config import Pretrain
from famt.train.signals.attention import Live, Rolling
from famt.train.signals.cached import Cached, CachedOfOthers
from famt.train.signals.config import OFF, Slot
from famt.train.signals.hardness import Errors
from famt.train.signals.refreshed import CachedThenRefreshed, Refreshed
from famt.train.signals.seen import Seen
from famt.train.signals.signal import Context, Signal

Scores = dict[str, tuple[Tensor, float]]
"""of each signal, by its slot: scores `[B, N]` of patches, and their power in the weight"""

# Slot -> source -> of the slot's options and the context, a signal. Packages add sources for any
# slot by entry points in "famt.signals".
SOURCES: dict[str, dict[str, Callable[[Any, Context], Signal]]] = {
    "frequency": {
        "cached": Cached,
        "cached-of-others": CachedOfOthers,
        "refreshed": Refreshed,
        "cached-then-refreshed": CachedThenRefreshed,
    },
    "attention": {"live": Live, "rolling": Rolling, "seen": Seen, "refreshed": Refreshed},
    "hardness": {"errors": Errors},
}


def build_signals(config: Pretrain, context: Context) -> list[Signal]:
    """The signals of a run, one for each slot that is not off.

    Raises:
        ValueError: no such source.
    """
    return [
        build_signal(name, slot, context) for name, slot in config.slots.items() if not slot.is_off
    ]


def build_signal(name: str, slot: Slot, context: Context) -> Signal:
    """The signal of a slot that is not off.

    Raises:
        ValueError: no such source.
    """
    signal = _source(name, slot.source)(slot, context)
    signal.name = name
    return signal


@dataclass(frozen=True)
class Weighed:
    """Crops whose patches are ready to be drawn.

    Attributes:
        crops: `[B]`.
        scores: of the signals that have something to say.
        weights: `[B, N]` float32.
        join: how they are drawn; plain where no signal has anything to say yet.
        progress: share of the run's steps that are done, in [0, 1].
    """

    crops: CropBatch
    scores: Scores
    weights: Tensor
    join: JoinConfig
    progress: float

    def split(self, sizes: PatchConfig, generator: torch.Generator) -> PatchBatch:
        """Draw the patches, and gather those that are needed."""
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
    """Weigh the patches of crops, for a step of a run or for a picture of it.

    Args:
        config: of the run.
        signals: its signals.
        epoch, step, progress: where it is.
        look: for a picture, see `Signal.look`.
    """
    plain = epoch < config.plain_until
    scores = {} if plain else read_signals(signals, crops, step, look=look)
    # Signals that have nothing to say yet leave the run what it is without weights.
    join = config.plain if plain or (config.weighs and not scores) else config.join
    return Weighed(crops, scores, weigh(scores, crops, config.sizes.grid), join, progress)


def read_signals(
    signals: Sequence[Signal], crops: CropBatch, step: int, *, look: bool = False
) -> Scores:
    """Scores `[B, N]` and exponent of every signal that has something to say of crops.

    Args:
        look: for a picture, see `Signal.look`.
    """
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
    """Weights `[B, grid**2]` float32 of the patches: the product of signals, each over its mean in
    the crop, to its exponent; all ones without any."""
    if not scores:
        return torch.ones(len(crops.rows), grid**2, device=crops.images.device)
    return patch_weights(
        {name: found for name, (found, _) in scores.items()},
        {name: exponent for name, (_, exponent) in scores.items()},
    )


def _source(slot: str, name: str) -> Callable[[Any, Context], Signal]:
    own = SOURCES[slot]
    if name in own:
        return own[name]
    plugin = find_plugin("famt.signals", name, [OFF, *own], f"--{slot}.source {name}")
    found: Callable[[Any, Context], Signal] = plugin.load()
    return found
