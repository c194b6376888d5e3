"""From the options of a run to its signals, and from signals to the weights of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from famt.sampling import patch_weights
from pipeline.loader import CropBatch
from train.signals.attention import Live, Rolling
from train.signals.cached import Cached, CachedOfOthers
from train.signals.hardness import Errors
from train.signals.refreshed import CachedThenRefreshed, Refreshed
from train.signals.seen import Seen
from train.signals.signal import Context, Signal

Scores = dict[str, tuple[Tensor, float]]
"""of each signal, by its slot: scores `[B, N]` of patches, and their power in the weight"""

OFF = "off"

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


def build_signals(context: Context) -> list[Signal]:
    """The signals of a run, one for each slot that is not off.

    Raises:
        ValueError: no such source.
    """
    signals = []
    for name in SOURCES:
        slot = getattr(context.config, name)
        if slot.source != OFF:
            signal = _source(name, slot.source)(slot, context)
            signal.name = name
            signals.append(signal)
    return signals


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
    own, added = SOURCES[slot], _added()
    if name in own:
        return own[name]
    if name not in added:
        raise ValueError(
            f"--{slot}.source {name}: there are {', '.join([OFF, *own, *added])}. Others come "
            "with packages that have an entry point in 'famt.signals'; is one missing here?"
        )
    found: Callable[[Any, Context], Signal] = added[name].load()
    return found


@cache
def _added() -> dict[str, EntryPoint]:
    return {each.name: each for each in entry_points(group="famt.signals")}
