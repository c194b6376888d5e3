"""The interface of a signal: a score for each patch of each crop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.models import PatchConfig
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.loader import CropBatch, Views
from famt.sampling import PatchSplit
from famt.train.distributed import Ranks
from famt.train.log import Log
from famt.train.stop import Stop

if TYPE_CHECKING:
    from famt.train.signals.refreshed_maps import RefreshedMaps


@dataclass(frozen=True)
class Context:
    """What a run offers its signals.

    Attributes:
        samples: the training images, one per row.
        sizes: of crops and patches.
        encoder: of the model in training.
        ranks: this rank among those of the run.
        cached: loads the maps `[R, G, G]` of the pixel score from the cache.
        score: name of that score.
        seed: of the run.
        parts: number of parts a batch is split into, to save memory.
        bf16: whether the model computes under autocast.
        refreshed: the maps of refreshed signals, if the run has any.
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
    """A training step, before the update of the weights.

    Attributes:
        views: the crops, `[B]`.
        split: their masked, thrown and visible patches.
        errors: `[B, K]` float32, mean error of each predicted patch.
        number: step number.
    """

    views: Views
    split: PatchSplit
    errors: Tensor
    number: int


class Signal:
    """A score for each patch of each crop, one factor of its weight.

    A source of your own overrides `read`, and other methods as needed. All ranks call the same
    methods in the same order.

    Attributes:
        name: of its slot, for pictures, logs and checkpoints.
        exponent: of the score in the weight, at present.
        reads_cache: the run needs the pixel score of every image in the cache.
        needs_refresh: the run needs the refresh job.
    """

    reads_cache: ClassVar[bool] = False
    needs_refresh: ClassVar[bool] = False
    name: str = "signal"
    exponent: float = 1.0

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float >= 0 on their device, of any scale; None before
        there are any."""
        raise NotImplementedError

    def look(self, crops: CropBatch, step: int) -> Tensor | None:
        """As `read`, for a picture; changes nothing of the run."""
        return self.read(crops, step)

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        """Called before an epoch; False if the run was asked to stop while the signal waited."""
        return True

    def learn(self, step: Step) -> None:
        """Called once a step, after the forward and backward passes of all its parts."""

    def synchronise(self) -> None:
        """Bring all machines to the same state, after an epoch and before a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly."""

    def restart(self, state: dict[str, Any], epoch: int) -> None:
        """Resume at the start of an epoch, with other options or images."""
        self.load_state_dict(state)

    def saved(self, step: int, log: Log | None) -> None:
        """Called after a checkpoint was written."""

    def scalars(self) -> dict[str, float]:
        """Values for the log, by name."""
        return {}

    def describe(self) -> str:
        """Its line in the run's plan."""
        return f"{self.name} to the power {self.exponent:g}"

    def close(self, *, finished: bool) -> None:
        """Called at the end: the run is finished, or was stopped."""
