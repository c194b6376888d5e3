"""The options of each evaluator."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le, Lt, MinLen

from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, PLACE, Checked, RandomView, Seed, notes_of
from famt.train.config import OptimiserConfig, TrainingOptions

Pooling = Literal["cls", "mean", "attentive"]

APART = "told apart from the options of an evaluation"
"""note beside an option: results name it by themselves, or do not depend on it"""


@dataclass(frozen=True)
class Evaluation(Checked):
    """What every evaluation needs to know."""

    checkpoint: Annotated[str, APART]
    """run, checkpoint, or any other encoder that --init takes (see docs/export.md)"""
    cache: Annotated[str, FREE, PLACE, APART]
    """score cache; it comes to know the shards that it does not"""
    train: Annotated[list[str], FREE, PLACE]
    """shards to learn from"""
    val: Annotated[list[str], FREE, PLACE]
    """shards to test on"""
    stage: Annotated[Path | None, FREE, PLACE, APART] = None
    """folder on a fast local disk that each machine fetches the shards into before it begins; what
    is there of any earlier run is used"""
    ema: Annotated[bool, APART] = False
    """take the averaged weights of the encoder, of a run with --optimiser.ema-decay"""
    untrained: Annotated[bool, APART] = False
    """take the same encoder with fresh random weights instead: the floor to beat"""
    centre: Annotated[float | None, Gt(0), Le(1)] = None
    """share of the shorter side that is shown; 0.875, or all of it for models of up to 64 px"""
    batch_size: Annotated[int, Ge(1)] = 256
    """images at a time"""
    device: Annotated[Literal["auto", "cpu", "cuda"], APART] = "auto"
    """what to compute on"""
    threads: Annotated[int | None, Ge(1), FREE, APART] = None
    """CPU threads that decode; a rank's share of the machine's cores if left out"""
    seed: Seed = 0
    """of all that is drawn at random"""
    json: Annotated[bool, FREE, APART] = False
    """print one JSON line in place of a table"""

    def told(self) -> dict[str, Any]:
        """What its values depend on beside the encoder, as plain data: the shards, and the options
        that are not as they come."""
        notes = notes_of(type(self))
        options = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if APART not in notes[each.name] and getattr(self, each.name) != each.default
        }
        plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
        return plain

    @property
    def weights(self) -> str:
        """Which of the checkpoint's weights it asks for: trained, ema or untrained."""
        return "untrained" if self.untrained else "ema" if self.ema else "trained"


@dataclass(frozen=True)
class Knn(Evaluation):
    """The classes of the nearest training images vote; nothing is learned."""

    k: Annotated[int, Ge(1)] = 20
    """neighbours that vote"""
    temperature: Annotated[float, Gt(0)] = 0.07
    """a neighbour of cosine similarity s has exp(s / temperature) votes"""


@dataclass(frozen=True)
class Probe(Evaluation):
    """Linear classifiers on the frozen encoder, and attentive pooling."""

    poolings: Annotated[tuple[Pooling, ...], MinLen(1)] = ("cls", "mean", "attentive")
    """features are the class token, as in MAE's own probe, the mean of the patch tokens, or a mean
    of the patch tokens by learned attention, for which all of them are kept: N x C x 2 bytes an
    image"""
    learning_rates: Annotated[tuple[float, ...], Gt(0), MinLen(1)] = (1e-2, 3e-2)
    """of Adam, with cosine decay; all are tried"""
    penalties: Annotated[tuple[float, ...], Ge(0), MinLen(1)] = (0.1, 1.0, 10.0, 100.0)
    """times half the squared weights, beside the sum of the cross-entropy over the images: 1 / C of
    scikit-learn's LogisticRegression; all are tried"""
    epochs: Annotated[int, Ge(1)] = 20
    """passes over the stored features"""
    steps: Annotated[int, Ge(1)] = 1000
    """steps to take at least, with few images in more passes"""
    step_images: Annotated[int, Ge(1)] = 1024
    """images a step"""
    hold_out: Annotated[float, Gt(0), Le(0.5)] = 0.1
    """share of the training images by which learning rate, penalty and pooling are chosen"""


@dataclass(frozen=True)
class Segment(Evaluation):
    """A linear classifier of patch tokens against masks, `<key>.mask.png` in the shards."""

    learning_rate: Annotated[float, Gt(0)] = 1e-2
    """of Adam, with cosine decay"""
    epochs: Annotated[int, Ge(1)] = 20
    """passes over the images, each through other crops"""
    steps: Annotated[int, Ge(1)] = 500
    """steps to take at least, with few images in more passes"""
    step_images: Annotated[int, Ge(1)] = 32
    """crops a step"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.25, 1.0)))
    """which part of an image a crop to learn from shows; all of it is tested"""


@dataclass(frozen=True)
class Mixing:
    """How images and classes are blurred, so that a model does not learn them by heart."""

    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment; it runs on the CPU, image by image; '' for none"""
    mixup: Annotated[float, Ge(0)] = 0.8
    """alpha of mixup; 0 for none"""
    cutmix: Annotated[float, Ge(0)] = 1.0
    """alpha of CutMix; 0 for none. Where both are wanted, each takes half of the batches"""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """share of a target that all classes have in common"""
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.1
    """share of the images that skip the last block; it grows from 0 in the first"""


@dataclass(frozen=True)
class FinetuneOptimiser(OptimiserConfig):
    """AdamW with cosine decay after a linear warm-up, as MAE fine-tunes (appendix A.1)."""

    base_learning_rate: Annotated[float, Gt(0)] = 5e-4
    """learning rate for 256 images a step; it grows with the effective batch"""
    warmup_epochs: Annotated[float, Ge(0)] = 5.0
    """epochs of linear warm-up from 0"""
    layer_decay: Annotated[float, Gt(0), Le(1)] = 0.65
    """learning rate of a block, of that of the block after it"""


@dataclass(frozen=True, kw_only=True)
class Finetune(Evaluation, TrainingOptions):
    """Encoder and classifier trained together; a run of its own."""

    out: Annotated[Path, FREE, PLACE]
    """folder of the run: checkpoints, log.jsonl, TensorBoard events"""
    epochs: Annotated[int, Ge(1)] = 100
    """passes over the images"""
    batch_size: Annotated[int, Ge(1), ELASTIC] = 64
    """images a step on each rank; even with mixup or CutMix"""
    optimiser: Annotated[FinetuneOptimiser, ELASTIC] = field(default_factory=FinetuneOptimiser)
    mixing: Mixing = field(default_factory=Mixing)
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.08, 1.0)))
    pooling: Literal["mean", "cls"] = "mean"
    """the classifier takes the mean of the patch tokens, as MAE's, or the class token"""
    shuffle_buffer: Annotated[int, Ge(0)] = 4096
    """encoded images held to draw from at random"""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 computes under autocast"""
    val_epochs: Annotated[int, Ge(1), FREE] = 1
    """epochs between tests on --val; the last one is tested in any case"""
    resume: Annotated[Literal["auto", "never"], FREE] = "auto"
    """go on from the last checkpoint in --out, or refuse a folder that holds one"""
    elastic: Annotated[bool, FREE] = False
    """resume with other shards, batch size, optimiser options or ranks too, from the beginning of
    the epoch"""
    checkpoint_minutes: Annotated[float, Ge(0), FREE] = 10.0
    """time between checkpoints; one is written at the end and on SIGTERM or SIGUSR1 as well"""
    keep_checkpoints: Annotated[int, Ge(1), FREE] = 2
    """how many of the last checkpoints stay"""
    log_steps: Annotated[int, Ge(1), ELASTIC] = 20
    """steps between log points, at which checkpoints are written that are due"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mixing.mixup or self.mixing.cutmix) and self.batch_size % 2:
            raise UserError(
                f"--batch-size {self.batch_size} must be even, as mixup and CutMix take pairs"
            )


Evaluate = (
    Annotated[Knn, tyro.conf.subcommand("knn")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Segment, tyro.conf.subcommand("segment")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
)
