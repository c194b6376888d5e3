"""Fine-tuning: encoder and classifier trained together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, LoaderConfig, RandomView
from famt.train.config import OptimiserConfig, TrainingOptions
from famt.train.evaluate.evaluation import Evaluation

_LONG_RUN = 50
"""epochs from which a run is augmented as MAE's are; MAE fine-tunes for 50 or 100"""
_LONG_RATE, _SHORT_RATE = 5e-4, 2e-3


@dataclass(frozen=True)
class Mixing:
    """Regularisation: augmentation, mixed images and labels, drop path. What is not given is as in
    MAE's fine-tuning in runs of 50 epochs or more, and off in shorter ones."""

    randaugment: str | None = None
    """RandAugment policy in timm's notation, applied on the CPU, image by image; '' for none, MAE's
    is rand-m9-mstd0.5-inc1"""
    mixup: Annotated[float | None, Ge(0)] = None
    """alpha of mixup; 0 turns it off, MAE's is 0.8"""
    cutmix: Annotated[float | None, Ge(0)] = None
    """alpha of CutMix; 0 turns it off, MAE's is 1. With both, each gets half of the batches"""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """share of each target spread evenly over all classes"""
    drop_path: Annotated[float | None, Ge(0), Lt(1)] = None
    """drop rate of the last block; it grows linearly from 0 at the first; MAE's is 0.1"""

    def resolved(self, epochs: int) -> Mixing:
        """With a value for each option, in a run of so many epochs."""
        long = Mixing("rand-m9-mstd0.5-inc1", 0.8, 1.0, self.label_smoothing, 0.1)
        short = Mixing("", 0.0, 0.0, self.label_smoothing, 0.0)
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(long if epochs >= _LONG_RUN else short, **given)


@dataclass(frozen=True)
class FinetuneView(RandomView):
    """A random resized crop and flip."""

    area: Annotated[tuple[float, float] | None, Gt(0), Le(1)] = None  # type: ignore[assignment]
    """range of the crop's share of the image area; if not given, 0.08 to 1 as in MAE's fine-tuning
    in runs of 50 epochs or more, 0.35 to 1 in shorter ones"""

    def __post_init__(self) -> None:
        if self.area is not None:
            super().__post_init__()

    def resolved(self, epochs: int) -> RandomView:
        """With a value for each option, in a run of so many epochs."""
        area = self.area or ((0.08, 1.0) if epochs >= _LONG_RUN else (0.35, 1.0))
        return RandomView(**{**vars(self), "area": area})


@dataclass(frozen=True)
class FinetuneOptimiser(OptimiserConfig):
    """AdamW with linear warm-up and cosine decay, as in MAE's fine-tuning (appendix A.1)."""

    base_learning_rate: Annotated[float | None, Gt(0)] = None  # type: ignore[assignment]
    """learning rate at an effective batch of 256 images; scales with the batch. If not given, MAE's
    5e-4 in runs of 50 epochs or more; in shorter ones 2e-3, but at most the rate that MAE's takes
    for its batch of 1,024"""
    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.65
    """each block's learning rate as a share of the next block's"""

    def resolved(self, epochs: int, effective_batch: int) -> FinetuneOptimiser:
        """With a value for each option, in a run of so many epochs."""
        short = _SHORT_RATE * min(1.0, 256 / effective_batch)
        default = _LONG_RATE if epochs >= _LONG_RUN else short
        return replace(self, base_learning_rate=self.base_learning_rate or default)


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingOptions, Evaluation):
    """Train encoder and classifier together, as a run of its own."""

    epochs: Annotated[int, Ge(1)] = 100
    """passes over the images"""
    optimiser: Annotated[FinetuneOptimiser, ELASTIC] = field(default_factory=FinetuneOptimiser)
    mixing: Mixing = field(default_factory=Mixing)
    view: FinetuneView = field(default_factory=FinetuneView)
    pooling: Literal["mean", "cls"] = "mean"
    """input of the classifier: the mean of the patch tokens, as in MAE, or the class token"""
    head: Literal["discriminant", "zero"] = "discriminant"
    """initial weights of the classifier: a linear discriminant of the encoder's features of all
    training images, or near zero, as in MAE"""
    val_epochs: Annotated[int, Ge(1), FREE] = 1
    """epochs between tests on --val; the last epoch is always tested"""

    measured_by: ClassVar = "finetuning:finetune"

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing = self.mixing.resolved(self.epochs)
        if (mixing.mixup or mixing.cutmix) and self.batch_size % 2:
            raise UserError(
                f"--batch-size {self.batch_size} must be even: mixup and CutMix pair images"
            )

    def loader(self, image_size: int) -> LoaderConfig:
        """What a loader of crops of `image_size` px needs to know."""
        return replace(super().loader(image_size), view=self.view.resolved(self.epochs))
