"""What a signal is: how heavy each patch of each crop is, from one source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.models import PatchConfig
from famt.pipeline.dataset import SampleTable
from famt.pipeline.loader import CropBatch, Views
from famt.sampling import PatchSplit
from famt.train.distributed import Ranks
from famt.train.log import Log
from famt.train.streams import Stop

if TYPE_CHECKING:
    from famt.train.signals.refreshed import RefreshedMaps


@dataclass(frozen=True)
class Context:
    """What a signal may ask of its run.

    Attributes:
        samples: the images that it trains on, a row each.
        sizes: of the crops and their patches.
        encoder: of the model in training.
        ranks: this rank among those of the run.
        cached: gives the maps `[R, G, G]` of the pixel score, from the cache.
        score: name of that score.
        seed: of the run.
        parts: that a batch goes through the model in, one after another.
        bf16: whether the model computes under autocast.
        refreshed: the maps of the run's refreshed signals, if it has any.
    """

    samples: SampleTable
    sizes: PatchConfig
    encoder: VisionTransformer
    ranks: Ranks
    cached: Callable[[], Tensor]
    score: str
    seed: int = 0
    parts: int = 1
    bf16: bool = False
    refreshed: RefreshedMaps | None = None

    @property
    def grid(self) -> int:
        """Patches a side of a crop."""
        return self.sizes.grid


@dataclass(frozen=True)
class Step:
    """A training step before the update of the weights.

    Attributes:
        views: the crops, `[B]`.
        split: which of their patches were masked, thrown and visible.
        errors: `[B, K]` float32, mean error of each masked patch that was predicted.
        number: of the step.
    """

    views: Views
    split: PatchSplit
    errors: Tensor
    number: int


class Signal:
    """How heavy each patch of each crop is. A source of one's own overrides `read`, and the rest as
    it needs.

    Every rank has one, and calls the same methods in the same order.

    Attributes:
        name: of the slot that it is in, for pictures, logs and checkpoints.
        exponent: power in the weight of the patch, at present.
    """

    name: str = "signal"
    exponent: float = 1.0

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float >= 0 on their device, any scale; None so far."""
        raise NotImplementedError

    def look(self, crops: CropBatch, step: int) -> Tensor | None:
        """As `read`, for a picture: nothing of the run changes."""
        return self.read(crops, step)

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        """An epoch begins; returns False if the run was asked to stop while the signal waited."""
        return True

    def learn(self, step: Step) -> None:
        """Take up what a training step computed."""

    def synchronise(self) -> None:
        """Bring all machines to the same content: an epoch ended, or a checkpoint is due."""

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint must keep; tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint with the very next batch."""

    def restart(self, state: dict[str, Any], epoch: int) -> None:
        """Go on from a checkpoint at the beginning of an epoch, with other options or images."""
        self.load_state_dict(state)

    def saved(self, step: int, log: Log | None) -> None:
        """A checkpoint was written."""

    def scalars(self) -> dict[str, float]:
        """What the log shows of it, by name."""
        return {}

    def describe(self) -> str:
        """What a reader of the run's plan should know of it."""
        return f"{self.name} to the power {self.exponent:g}"

    def close(self, *, finished: bool) -> None:
        """The run ends: finished, or to be gone on with."""
