"""Hardness: how badly patches were reconstructed when they were masked."""

from __future__ import annotations

from famt.train.signals.banked import Banked
from famt.train.signals.config import HardnessConfig
from famt.train.signals.signal import Context, Step


class Errors(Banked):
    """Maps of the predicted patches' errors, as ranks within the crop divided by their number.

    Errors shrink during training, ranks do not, so values of different steps compare. After Wang et
    al., "Hard Patches Mining for Masked Image Modeling", CVPR 2023, where a second network predicts
    the errors.
    """

    def __init__(self, slot: HardnessConfig, context: Context) -> None:
        super().__init__(slot.exponent, context)

    def learn(self, step: Step) -> None:
        ranks = step.errors.argsort(dim=1, stable=True).argsort(1).float() + 1
        self.write_at(step.views, step.split.predicted, ranks / ranks.shape[1], step.number)

    def describe(self) -> str:
        return f"reconstruction errors by rank, to the power {self.exponent:g}"
