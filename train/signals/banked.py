"""Signals stored in a bank of maps: written for some crops, read for all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from famt.pipeline.loading.loader import CropBatch, Views
from famt.pipeline.scoring.memory_bank import MapBank
from famt.train.signals.config import HardnessConfig
from famt.train.signals.signal import Context, Signal, Step


class Banked(Signal):
    """A signal whose scores are kept in a `MapBank`, in the frame of each image.

    Each image comes up at most once per epoch, on one rank. So the ranks of a machine write into
    one shared bank at once, and machines exchange what they wrote after an epoch or before a
    checkpoint.
    """

    def __init__(self, exponent: float, context: Context) -> None:
        self.exponent, self.grid = exponent, context.grid
        self._ranks = context.ranks
        self._data, rows = context.samples.digest, len(context.samples)
        self.bank = self._ranks.share(lambda: MapBank(rows, context.grid))

    def look(self, crops: CropBatch, step: int) -> Tensor:
        """Scores from the bank, `[B, grid**2]` float32 on the crops' device."""
        return self.bank.read(crops, self.grid)

    def read(self, crops: CropBatch, step: int) -> Tensor:
        return self.look(crops, step)

    def write_at(self, views: Views, index: Tensor, scores: Tensor, step: int) -> None:
        """Store scores `[B, M]` of the patches at `index [B, M]` of crops, on any device."""
        everywhere = scores.new_zeros(len(scores), self.grid**2).scatter(1, index, scores)
        known = everywhere.new_zeros(everywhere.shape).scatter(1, index, 1.0).bool()
        self.bank.write_later(views, everywhere, step, known)

    def synchronise(self) -> None:
        self.bank.flush()
        ranks = self._ranks
        nodes = ranks.gather(ranks.node)  # also waits for all ranks' last writes
        if len(set(nodes)) > 1:
            leads = nodes.index(ranks.node) == ranks.rank
            sent = ranks.gather(self.bank.news() if leads else None)
            for node, news in zip(nodes, sent, strict=True):
                if leads and news is not None and node != ranks.node:
                    self.bank.merge(*news)
            ranks.gather(None)

    def state_dict(self) -> dict[str, Any]:
        return {"data": self._data, **self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["data"] == self._data:  # rows of other images are useless
            self.bank.load_state_dict(state)

    def scalars(self) -> dict[str, float]:
        return {f"{self.name}_coverage": self.bank.coverage}


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
