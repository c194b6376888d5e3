"""How hard the model finds patches to reconstruct, from the steps that masked them."""

from __future__ import annotations

from famt.train.signals.banked import Banked
from famt.train.signals.config import HardnessConfig
from famt.train.signals.signal import Context, Step


class Errors(Banked):
    """Ranks of the masked patches' errors within their crop, kept at the cells of the patches.

    Errors shrink as the model learns, ranks do not: a map compares patches whenever they were
    masked. After Wang et al., "Hard Patches Mining for Masked Image Modeling", CVPR 2023, which
    trains a second network to predict them.
    """

    def __init__(self, slot: HardnessConfig, context: Context) -> None:
        super().__init__(slot.exponent, context)

    def learn(self, step: Step) -> None:
        ranks = step.errors.argsort(dim=1, stable=True).argsort(1).float() + 1
        self.write_at(step.views, step.split.predicted, ranks / ranks.shape[1], step.number)

    def describe(self) -> str:
        return f"reconstruction errors by rank, to the power {self.exponent:g}"
