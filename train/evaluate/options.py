"""The options of each evaluator.

Options named Knn belong to the command `famt evaluate knn` and the function `knn` in knn.py. Add an
evaluator as a class here, in `Evaluate`, and a module.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen

from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, PLACE, Checked, RandomView, Seed, notes_of
from famt.train.config import APART, Device, OptimiserConfig, TrainingOptions

Pooling = Literal["cls", "mean", "attentive"]


@dataclass(frozen=True)
class Evaluation(Checked):
    """What every evaluation needs."""

    checkpoint: Annotated[str, APART]
    """run, checkpoint, or any other encoder that --init takes (see docs/export.md)"""
    cache: Annotated[str, FREE, PLACE]
    """score cache; shards it does not know yet are added"""
    train: Annotated[list[str], FREE, PLACE]
    """shards to learn from"""
    val: Annotated[list[str], FREE, PLACE]
    """shards to test on"""
    stage: Annotated[Path | None, FREE, PLACE] = None
    """folder on a fast local disk; each machine copies the shards there first and reuses what
    earlier runs copied"""
    ema: Annotated[bool, APART] = False
    """use the averaged weights of the encoder, of a run with --optimiser.ema-decay"""
    untrained: Annotated[bool, APART] = False
    """use the same encoder with fresh random weights: the floor to beat"""
    centre: Annotated[float | None, Gt(0), Le(1)] = None
    """side of the central crop, as a share of the image's shorter side; if not given, 0.875,
    or 1 for models of up to 64 px"""
    batch_size: Annotated[int, Ge(1)] = 256
    """images per batch"""
    device: Device = "auto"
    """where to compute; auto takes a GPU if there is one"""
    threads: Annotated[int | None, Ge(1), FREE] = None
    """CPU threads that decode; the rank's share of the cores if not given"""
    seed: Seed = 0
    """seed of all random draws"""
    json: Annotated[bool, FREE] = False
    """print one JSON line instead of a table"""

    def conditions(self) -> dict[str, Any]:
        """What the result depends on besides the encoder, as plain data: the shards, and the
        options that differ from their defaults."""
        notes = notes_of(type(self))
        options = {"train": self.train, "val": self.val} | {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if not {APART, FREE} & {*notes[each.name]} and getattr(self, each.name) != each.default
        }
        plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
        return plain

    @classmethod
    def evaluator(cls) -> str:
        """Name of the evaluator: its command, module and function."""
        return cls.__name__.lower()

    @property
    def weights(self) -> str:
        """Which weights are evaluated: trained, ema or untrained."""
        return "untrained" if self.untrained else "ema" if self.ema else "trained"


@dataclass(frozen=True)
class Knn(Evaluation):
    """Classify by a vote of the nearest training images; nothing is learned."""

    k: Annotated[int, Ge(1)] = 20
    """number of neighbours that vote"""
    temperature: Annotated[float, Gt(0)] = 0.07
    """a neighbour at cosine similarity s has exp(s / temperature) votes"""


@dataclass(frozen=True)
class Probe(Evaluation):
    """Linear classifiers on the frozen encoder: class token, mean of patches, attentive pooling."""

    poolings: Annotated[tuple[Pooling, ...], MinLen(1)] = ("cls", "mean", "attentive")
    """features to classify: the class token (as in MAE's probe), the mean of the patch tokens, or
    their mean under learned attention, which keeps all N tokens of C values: N x C x 2 bytes per
    image"""
    learning_rates: Annotated[tuple[float, ...], Gt(0), MinLen(1)] = (1e-2, 3e-2)
    """learning rates of Adam to try, with cosine decay"""
    penalties: Annotated[tuple[float, ...], Ge(0), MinLen(1)] = (0.1, 1.0, 10.0, 100.0)
    """L2 penalties to try: 1 / C of scikit-learn's LogisticRegression, that is, times half the
    squared weights, added to the cross-entropy summed over images"""
    epochs: Annotated[int, Ge(1)] = 20
    """passes over the stored features, at least"""
    steps: Annotated[int, Ge(1)] = 1000
    """steps, at least; small sets get more passes"""
    step_images: Annotated[int, Ge(1)] = 1024
    """images per step"""
    hold_out: Annotated[float, Gt(0), Le(0.5)] = 0.1
    """share of the training images held out to choose learning rate, penalty and pooling"""


@dataclass(frozen=True)
class Segment(Evaluation):
    """Linear segmentation: patch tokens against the masks `<key>.mask.png` in the shards."""

    learning_rate: Annotated[float, Gt(0)] = 1e-2
    """learning rate of Adam, with cosine decay"""
    epochs: Annotated[int, Ge(1)] = 20
    """passes over the images, at least, each with new crops"""
    steps: Annotated[int, Ge(1)] = 500
    """steps, at least; small sets get more passes"""
    step_images: Annotated[int, Ge(1)] = 32
    """crops per step"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.25, 1.0)))
    """crops to learn from; tests use whole images"""


_LONG_RUN = 50
"""epochs from which a run is regularised as MAE's are; MAE fine-tunes for 50 or 100"""


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
class FinetuneOptimiser(OptimiserConfig):
    """AdamW with linear warm-up and cosine decay, as in MAE's fine-tuning (appendix A.1)."""

    base_learning_rate: Annotated[float, Gt(0)] = 5e-4
    """learning rate at an effective batch of 256 images; scales with the batch"""
    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.65
    """each block's learning rate as a share of the next block's"""


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingOptions, Evaluation):
    """Train encoder and classifier together, as a run of its own."""

    epochs: Annotated[int, Ge(1)] = 100
    """passes over the images"""
    optimiser: Annotated[FinetuneOptimiser, ELASTIC] = field(default_factory=FinetuneOptimiser)
    mixing: Mixing = field(default_factory=Mixing)
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.08, 1.0)))
    pooling: Literal["mean", "cls"] = "mean"
    """input of the classifier: the mean of the patch tokens, as in MAE, or the class token"""
    head: Literal["discriminant", "zero"] = "discriminant"
    """initial weights of the classifier: a linear discriminant of the encoder's features of all
    training images, or near zero, as in MAE"""
    val_epochs: Annotated[int, Ge(1), FREE] = 1
    """epochs between tests on --val; the last epoch is always tested"""

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing = self.mixing.resolved(self.epochs)
        if (mixing.mixup or mixing.cutmix) and self.batch_size % 2:
            raise UserError(
                f"--batch-size {self.batch_size} must be even: mixup and CutMix pair images"
            )


Evaluate = Knn | Probe | Segment | Finetune
EVALUATIONS: dict[str, type[Evaluation]] = {each.evaluator(): each for each in get_args(Evaluate)}
