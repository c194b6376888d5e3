"""The options of trainings, and the command line of a pre-training run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Lt

from famt.methods import METHODS
from famt.models import MODELS, DecoderName, ModelConfig, timm_model
from famt.patch_counts import patch_counts
from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.options import (
    ELASTIC,
    FREE,
    MAIN,
    PLACE,
    Checked,
    JoinConfig,
    LoaderConfig,
    LoaderOptions,
    RandomView,
    Seed,
    annotated,
    differing,
    restored,
)
from famt.pipeline.scores import ScoreSpec
from famt.train import recipe
from famt.train.signals.config import (
    AttentionConfig,
    FrequencyConfig,
    HardnessConfig,
    RefreshConfig,
    Slot,
)

Tracker = Literal["tensorboard", "wandb", "mlflow"]

TIMM = "timm:"
"""Prefix of `--init` and `--model` that marks the name of a timm model."""

APART = "apart from the options of a result"
"""note beside an option: evaluations' results name it separately, or do not depend on it"""

Device = Annotated[Literal["auto", "cpu", "cuda"], APART]


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with linear warm-up and cosine decay, as in MAE's pre-training (appendix A.1)."""

    base_learning_rate: Annotated[float, Ge(0)] = 1.5e-4
    """learning rate at an effective batch of 256 images; scales with the batch"""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """weight decay, except for biases and norms"""
    warmup_epochs: Annotated[float | None, Ge(0)] = None
    """epochs of linear warm-up from 0; if not given, a twentieth of the run, at most MAE's 40"""
    clip_norm: Annotated[float, Ge(0)] = 0.0
    """clip gradients to this global norm; 0 turns clipping off"""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """also keep an exponential moving average of the weights (in pre-training, of the encoder's)
    with this decay, for example 0.9999; 0 keeps none"""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(LoaderOptions):
    """Options that every kind of training has."""

    out: Annotated[Path, FREE, PLACE, MAIN]
    """folder of the run: checkpoints, log.jsonl, TensorBoard events"""
    view: RandomView = field(default_factory=RandomView)
    precision: Annotated[Literal["bf16", "fp32"], MAIN] = "fp32"
    """bf16 trains under autocast; faster on GPUs and, for wide models, on recent CPUs"""
    device: Annotated[Device, MAIN] = "auto"
    """where to train; auto takes a GPU if there is one"""
    compile: Annotated[bool, FREE] = False
    """compile the model with torch.compile"""
    resume: Annotated[Literal["auto", "never"], FREE] = "auto"
    """resume from the last checkpoint in --out, or refuse a folder that has one"""
    elastic: Annotated[bool, FREE] = False
    """resume even with other shards, scores, batch size, optimiser options or number of ranks, from
    the start of the epoch; an unchanged run still resumes exactly"""
    checkpoint_minutes: Annotated[float, Ge(0), FREE] = 10.0
    """time between checkpoints; the run also writes one at its end and on Ctrl-C,
    SIGTERM or SIGUSR1"""
    keep_checkpoints: Annotated[int, Ge(1), FREE] = 2
    """number of recent checkpoints to keep"""
    log_steps: Annotated[int, Ge(1), ELASTIC] = 20
    """steps between log points; checkpoints are written at log points"""
    track: Annotated[Tracker, FREE, APART] = "tensorboard"
    """also send curves and pictures to Weights & Biases or MLflow, set up by their own environment
    variables; TensorBoard is always written"""
    seed: Seed = 0
    """seed of weights, shuffling, crops and all other random draws"""

    def loader(self, image_size: int) -> LoaderConfig:
        """What a loader of crops of `image_size` px needs to know."""
        names = {each.name for each in dataclasses.fields(LoaderConfig)} - {"image_size"}
        given = {name: getattr(self, name) for name in names}
        return LoaderConfig(image_size=image_size, **given)

    def absolute(self) -> Self:
        """The same options with absolute paths, valid in any working directory."""
        changes: dict[str, Any] = {}
        for name, value, notes in annotated(self):
            if PLACE in notes:
                group, _, option = name.partition(".")
                place = _absolute(value)
                if option:
                    place = dataclasses.replace(getattr(self, group), **{option: place})
                changes[group] = place
        return dataclasses.replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """The options as plain data, as kept in checkpoints."""
        plain: dict[str, Any] = json.loads(
            json.dumps(dataclasses.asdict(self.absolute()), default=str)
        )
        return plain

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> Self:
        """The options that `describe` turned into plain data."""
        return restored(cls, described)


def _absolute(place: Any) -> Any:
    if isinstance(place, list):
        return [storage.normalise_url(each) for each in place]
    if isinstance(place, Path):
        return place.absolute()
    is_name = place is None or place.startswith(TIMM)
    return place if is_name else storage.normalise_url(place)


@dataclass(frozen=True, kw_only=True)
class Inputs(Checked):
    """What a pre-training run reads."""

    shards: Annotated[list[str], FREE, PLACE, MAIN]
    """tars, folders of tars, wildcards or brace patterns (quoted)"""
    cache: Annotated[str, FREE, PLACE, MAIN]
    """folder or object-store URL of the score cache"""
    stage: Annotated[Path | None, FREE, PLACE] = None
    """folder on a fast local disk; each machine copies its shards there first and reuses what
    earlier runs copied"""
    recipe: Annotated[str, FREE, MAIN] = recipe.DEFAULT
    """sets the defaults of other options: a recipe listed above, or the path of your own file"""
    init: Annotated[str | None, PLACE, MAIN] = None
    """start from these weights instead of random ones: a run, an MAE checkpoint, a file or folder
    of timm or transformers, or timm:<name>"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """What a pre-training run trains: method, model and sizes."""

    method: Annotated[Literal[tuple(METHODS)], MAIN] = "mae"  # type: ignore[valid-type]
    """pre-training method"""
    model: Annotated[str, MAIN] = "vit_base"
    """width and depth of encoder and decoder: vit_nano, vit_micro (32-px images in 4-px patches by
    default), vit_tiny, vit_small, vit_base, vit_large (224 px in 16), vit_huge (224 px in 14), or
    timm:<name>, an architecture of timm"""
    image_size: Annotated[int | None, Ge(1), MAIN] = None
    """side of the crops, px; the model's if not given"""
    patch_size: Annotated[int | None, Ge(1)] = None
    """side of a patch, px; the model's if not given"""
    decoder: DecoderName = "self"
    """self: self-attention over all tokens, as in MAE; cross: masked patches attend to visible ones
    only, as in CrossMAE"""
    decoder_width: Annotated[int | None, Ge(1)] = None
    """token width of the decoder; the model's if not given"""
    decoder_depth: Annotated[int | None, Ge(1)] = None
    """number of decoder blocks; the model's if not given"""
    decoder_heads: Annotated[int | None, Ge(1)] = None
    """attention heads of the decoder; the model's if not given"""
    unit: Annotated[int | None, Ge(1)] = None
    """patches are masked in squares of this many patches a side; if not given, 1 for
    MAE and 2 for SimMIM"""
    normalise_targets: bool | None = None
    """predict patches normalised by their own mean and deviation; by default MAE does, SimMIM does
    not"""
    low_pass: Annotated[float | None, Gt(0)] = None
    """low-pass the target images, as in PixMIM: the highest frequency kept, in cycles per image
    side, for example 40 at 224 px"""
    fused: Annotated[tuple[int, ...], Ge(0)] = ()
    """encoder blocks, from 0, whose output also feeds the decoder (MFF): for example 0 2 4 6 8 of
    vit_base"""

    @property
    def sizes(self) -> ModelConfig:
        """Sizes of the model, after the method's defaults and these options."""
        names = (
            "image_size", "patch_size", "decoder_width", "decoder_depth", "decoder_heads", "unit",
            "normalise_targets", "low_pass",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        changes = {**METHODS[self.method].defaults, **given}
        if METHODS[self.method].has_decoder:
            changes["decoder"] = self.decoder
        if self.model.startswith(TIMM):
            name = self.model.removeprefix(TIMM)
            try:
                model = timm_model(name, self.image_size, self.patch_size)
            except ValueError as error:
                raise UserError(f"--model {error}") from None
        elif self.model in MODELS:
            model = MODELS[self.model]
        else:
            raise UserError(f"--model {self.model}: give {', '.join(MODELS)}, or timm:<name>")
        try:
            return dataclasses.replace(model, fused=self.fused, **changes)
        except ValueError as error:  # begins with the name of a size
            name, _, rest = str(error).partition(" ")
            raise UserError(f"--{name.replace('_', '-')} {rest}") from None

    @property
    def plain(self) -> JoinConfig:
        """The method's own masking, without weights: random, nothing thrown."""
        return JoinConfig(mask_ratio=METHODS[self.method].plain_mask_ratio, throw_ratio=0.0)


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingOptions, ModelOptions, Inputs):
    """A pre-training run."""

    epochs: Annotated[int, Ge(1), MAIN] = 800
    """passes over the data"""
    accumulate: Annotated[int, Ge(1), ELASTIC] = 1
    """split each batch into this many parts, to save memory"""
    plain_epochs: Annotated[int, Ge(0)] = 0
    """epochs of plain MAE (75 % masked at random) or SimMIM (60 %) before weights and throwing
    start"""
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    hardness: HardnessConfig = field(default_factory=HardnessConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    optimiser: Annotated[OptimiserConfig, ELASTIC] = field(default_factory=OptimiserConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    spec: Annotated[ScoreSpec, ELASTIC] = field(default_factory=ScoreSpec)
    checkpoint_blocks: Annotated[bool, FREE] = False
    """recompute each block's activations in the backward pass (gradient checkpointing): less
    memory, a third more time"""
    picture_epochs: Annotated[int, Ge(0), FREE] = 20
    """epochs between pictures of the same six crops with weights, splits and reconstructions, the
    last one after the last step; 0 draws none"""
    monitor: Annotated[list[str], FREE, PLACE, MAIN] = field(default_factory=list)
    """labelled shards; k-NN and a quick linear probe of the encoder on them are plotted beside the
    loss. Training pauses meanwhile; the log says for how long"""
    monitor_epochs: Annotated[int, Ge(1), FREE] = 10
    """epochs between two evaluations by the monitor; it always runs after the last epoch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        patch, size = self.sizes.patch_size, self.attention.image_size
        if size is not None and (size < patch or size % patch):
            raise UserError(
                f"--attention.image-size {size} must be a multiple of {patch} px, the patch size"
            )
        units = (self.sizes.grid // self.sizes.unit) ** 2
        try:
            patch_counts(units, self.join.mask_ratio, self.join.throw_ratio)
        except ValueError as error:
            raise UserError(f"--join.mask-ratio, --join.throw-ratio: {error}") from None
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of --accumulate "
                f"{self.accumulate}"
            )

    @classmethod
    def with_suggestions(cls, arguments: list[str], default: Self) -> list[str]:
        """A command line with its shorthands spelled out; `default` holds the recipe's options."""
        return arguments

    @property
    def slots(self) -> dict[str, Any]:
        """The signals' slots, by name."""
        return {name: each for name, each in vars(self).items() if isinstance(each, Slot)}

    @property
    def weighs(self) -> bool:
        """Whether any signal weighs the patches."""
        return not all(slot.is_off for slot in self.slots.values())

    @property
    def refreshed_kinds(self) -> list[str]:
        """Kinds of model scores that the refresh job computes during the run, without repeats."""
        kinds = (each.kind for each in self.slots.values() if each.is_refreshed)
        return list(dict.fromkeys(kinds))

    @property
    def refreshes(self) -> range:
        """Epochs at whose start a new generation of those scores is due."""
        if not self.refreshed_kinds or self.refresh.pin:
            return range(0)
        every = self.refresh.every or math.ceil(self.epochs / 10)
        return range(self.plain_epochs or every, self.epochs, every)

    @property
    def plain_until(self) -> int:
        """The first epoch with weights: that of the first generation if all signals come from
        generations."""
        used = [each for each in self.slots.values() if not each.is_off]
        waits = all(each.is_refreshed and not each.is_cached for each in used)
        return self.plain_epochs or (self.refreshes.start if waits and not self.refresh.pin else 0)

    @property
    def cached_score(self) -> ScoreSpec | None:
        """The pixel score that every image must have in the cache, if the run reads one."""
        return self.spec if any(each.is_cached for each in self.slots.values()) else None

    def differing(self) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """(dotted name, value, notes) of the options that differ from the defaults in the code; an
        option added later is at its default in an older run."""
        return differing(self, **REQUIRED)

    def without_effect(self) -> list[str]:
        """Options that were given but change nothing beside the others, each with the reason."""
        weights = rf"({'|'.join(self.slots)}|spec|refresh)\.|join\.(visible|thrown|blend|loss)"
        one_step = self.attention.sources.keys() - {"rolling"}  # a package's source may take them
        rules = [
            (not self.weighs, weights, "no signal weighs patches"),
            *(
                (slot.is_off, rf"{name}\.", "its source is off")
                for name, slot in self.slots.items()
            ),
            (self.cached_score is None, r"spec\.", "no score is cached"),
            (not self.frequency.is_cached, r"frequency\.cached", "its score is not cached"),
            (self.attention.source in one_step, r"attention\.(every|image)", "it is not rolling"),
            (not self.refreshes, r"refresh\.(every|wait)", "no score is refreshed"),
            (self.join.predicted_share == 1, r"join\.predicted$", "all are predicted"),
            (not METHODS[self.method].has_decoder, "decoder", f"{self.method} has no decoder"),
            (not self.monitor, "monitor_epochs", "nothing is monitored"),
        ]
        found = []
        for name, _, _ in self.differing():
            reasons = (why for holds, idle, why in rules if holds and re.match(idle, name))
            if not name.endswith(".source") and (reason := next(reasons, None)):
                found.append(f"--{name.replace('_', '-')} ({reason})")
        return found


REQUIRED: dict[str, Any] = {"shards": [], "cache": "", "out": Path()}
"""by a recipe or by the command line"""
