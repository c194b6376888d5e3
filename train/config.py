"""The options of a pre-training run, and the command line that gives them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_type_hints

import tyro
from annotated_types import Ge, Gt, Lt

from famt.__main__ import called
from famt.methods import METHODS
from famt.models import MODELS, Decoder, ModelConfig
from famt.patch_counts import patch_counts
from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.options import (
    ELASTIC,
    FREE,
    MAIN,
    PLACE,
    Checked,
    DecodeConfig,
    JoinConfig,
    LoaderConfig,
    RandomView,
    Seed,
    annotated,
    notes_of,
    restored,
)
from famt.pipeline.scores import ScoreSpec
from famt.train import recipe
from famt.train.signals.config import (
    AttentionConfig,
    FrequencyConfig,
    HardnessConfig,
    RefreshConfig,
)

TIMM = "timm:"
"""What a source of initial weights begins with that is a name of timm's, and no path."""


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with cosine decay after a linear warm-up, as MAE pre-trains (appendix A.1)."""

    base_learning_rate: Annotated[float, Ge(0)] = 1.5e-4
    """learning rate for 256 images a step; it grows with the effective batch"""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """not applied to biases and norms"""
    warmup_epochs: Annotated[float, Ge(0)] = 40.0
    """epochs of linear warm-up from 0"""
    clip_norm: Annotated[float, Ge(0)] = 0.0
    """largest norm of all gradients together; 0 leaves them as they are"""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """keeps an exponential moving average of the weights as well (of the encoder's, in
    pre-training), 0.9999 say; 0 keeps none"""


class TrainingOptions(Checked):
    """What the options of every kind of training have in common."""

    out: Path
    batch_size: int
    precision: str
    resume: Literal["auto", "never"]
    elastic: bool
    checkpoint_minutes: float
    keep_checkpoints: int
    log_steps: int
    seed: int
    resident: bool = False

    def loader(self, image_size: int) -> LoaderConfig:
        """How crops of so many px are read; as by default where there is no such option."""
        names = {each.name for each in dataclasses.fields(LoaderConfig)} - {"image_size"}
        given = {name: value for name, value in vars(self).items() if name in names}
        return LoaderConfig(image_size=image_size, **given)

    @classmethod
    def with_suggestions(cls, arguments: list[str]) -> list[str]:
        """A command line with what some of its options stand for."""
        return arguments

    def absolute(self) -> Self:
        """The same options with paths that hold in any working directory."""
        changes: dict[str, Any] = {}
        for name, value, notes in annotated(self):
            if PLACE in notes:
                group, _, option = name.partition(".")
                place = _absolute(value)
                if option:
                    place = dataclasses.replace(getattr(self, group), **{option: place})
                changes[group] = place
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def describe(self) -> dict[str, Any]:
        """The options as plain data, as checkpoints keep them."""
        options = dataclasses.asdict(self.absolute())  # type: ignore[call-overload]
        plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
        return plain

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> Self:
        """The options that `describe` spelled out."""
        return restored(cls, described)


def _absolute(place: Any) -> Any:
    if isinstance(place, list):
        return [storage.normalise_url(each) for each in place]
    if isinstance(place, Path):
        return place.absolute()
    is_name = place is None or place.startswith(TIMM)
    return place if is_name else storage.normalise_url(place)


@dataclass(frozen=True)
class Pretrain(TrainingOptions):
    """A pre-training run."""

    shards: Annotated[list[str], FREE, PLACE, MAIN]
    """tars, folders of tars, wildcards or brace patterns (in quotes)"""
    cache: Annotated[str, FREE, PLACE, MAIN]
    """folder or object-store URL of the score cache"""
    out: Annotated[Path, FREE, PLACE, MAIN]
    """folder of the run: checkpoints, log.jsonl, TensorBoard events"""
    stage: Annotated[Path | None, FREE, PLACE] = None
    """folder on a fast local disk that each machine fetches its shards into before it begins; what
    is there of any earlier run is used"""
    recipe: Annotated[str, FREE, MAIN] = recipe.DEFAULT
    """sets the defaults of other options: one of those above, or the path of a file of your own"""
    init: Annotated[str | None, PLACE, MAIN] = None
    """begin with these weights in place of random ones: a run, an MAE checkpoint, a file or folder
    of timm or transformers, or timm:<name>"""
    method: Annotated[Literal[tuple(METHODS)], MAIN] = "mae"  # type: ignore[valid-type]
    """what is learned from masked images"""
    model: Annotated[Literal[tuple(MODELS)], MAIN] = "vit_base"  # type: ignore[valid-type]
    """widths and depths of encoder and decoder; nano and micro are made for 32-px images in 4-px
    patches, huge for 224 px in 14, the others for 224 px in 16"""
    image_size: Annotated[int | None, Ge(1), MAIN] = None
    """side of the crops, px, in place of the model's"""
    patch_size: Annotated[int | None, Ge(1)] = None
    """side of a patch, px, in place of the model's"""
    decoder: Decoder = "self"
    """self-attention as in MAE, or cross: masked patches look at visible ones only (CrossMAE)"""
    decoder_width: Annotated[int | None, Ge(1)] = None
    """token width of the decoder, in place of the model's"""
    decoder_depth: Annotated[int | None, Ge(1)] = None
    """blocks of the decoder, in place of the model's"""
    decoder_heads: Annotated[int | None, Ge(1)] = None
    """attention heads of the decoder, in place of the model's"""
    unit: Annotated[int | None, Ge(1)] = None
    """patches a side of the squares that are masked as a whole; SimMIM's are of 2, MAE's of 1"""
    normalise_targets: bool | None = None
    """predict each patch less its own mean, over its own deviation, as MAE does and SimMIM not"""
    low_pass: Annotated[float | None, Gt(0)] = None
    """predict images without their finest detail (PixMIM): the largest frequency that is left, in
    waves an image side, 40 for 224 px say"""
    fused: Annotated[tuple[int, ...], Ge(0)] = ()
    """blocks, from 0, whose output reaches the decoder beside that of the last (MFF): 0 2 4 6 8 of
    vit_base say"""
    epochs: Annotated[int, Ge(1), MAIN] = 800
    """passes over the data"""
    batch_size: Annotated[int, Ge(1), ELASTIC, MAIN] = 64
    """crops a step on each rank"""
    crops_per_image: Annotated[int, Ge(1), ELASTIC] = 1
    """crops of each image in a batch (repeated augmentation): an image is decoded once for all of
    them. An epoch is one decode of each image and has as many times the steps, so 800 epochs of 1
    crop are 200 of 4"""
    accumulate: Annotated[int, Ge(1), ELASTIC] = 1
    """parts that a batch goes through the model in, one after another, to save memory"""
    plain_epochs: Annotated[int, Ge(0)] = 0
    """epochs of plain MAE (75 % masked at random) or SimMIM (60 %) before weights and throwing
    begin"""
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    hardness: HardnessConfig = field(default_factory=HardnessConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    optimiser: Annotated[OptimiserConfig, ELASTIC] = field(default_factory=OptimiserConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    view: RandomView = field(default_factory=RandomView)
    spec: Annotated[ScoreSpec, ELASTIC] = field(default_factory=ScoreSpec)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """how crops are resized"""
    shuffle_buffer: Annotated[int, Ge(0)] = 4096
    """encoded images held to draw from at random"""
    precision: Annotated[Literal["bf16", "fp32"], MAIN] = "fp32"
    """bf16 computes under autocast; it pays on GPUs and, for wide models, on recent CPUs"""
    checkpoint_blocks: Annotated[bool, FREE] = False
    """compute the blocks' insides again in the backward pass: large models in less memory, for a
    third more time"""
    compile: Annotated[bool, FREE] = False
    """compile the model (torch.compile)"""
    device: Annotated[Literal["auto", "cpu", "cuda"], MAIN] = "auto"
    """what to train on"""
    threads: Annotated[int | None, Ge(1), FREE] = None
    """CPU threads that decode, on each rank; its share of the machine's cores if left out"""
    resident: bool = False
    """decode each image once and hold it in the device's memory, where crops are cut from it: for
    small sets, 3 bytes a pixel"""
    decode: Annotated[DecodeConfig, FREE] = field(default_factory=DecodeConfig)
    resume: Annotated[Literal["auto", "never"], FREE] = "auto"
    """go on from the last checkpoint in --out, or refuse a folder that holds one"""
    elastic: Annotated[bool, FREE] = False
    """resume with other shards, scores, batch size, optimiser options or ranks too, from the
    beginning of the epoch; where nothing differs the run goes on exactly"""
    checkpoint_minutes: Annotated[float, Ge(0), FREE] = 10.0
    """time between checkpoints; one is written at the end and on SIGTERM or SIGUSR1 as well"""
    keep_checkpoints: Annotated[int, Ge(1), FREE] = 2
    """how many of the last checkpoints stay"""
    log_steps: Annotated[int, Ge(1), ELASTIC] = 20
    """steps between log points, at which checkpoints are written that are due"""
    picture_epochs: Annotated[int, Ge(0), FREE] = 20
    """epochs between pictures of crops, weights, splits and reconstructions in TensorBoard; 0 for
    none"""
    monitor: Annotated[list[str], FREE, PLACE, MAIN] = field(default_factory=list)
    """labelled shards; k-NN and a quick probe of the encoder on them are drawn beside the loss. No
    step is taken meanwhile; the log tells for how long"""
    monitor_epochs: Annotated[int, Ge(1), FREE] = 10
    """epochs from one look of the monitor to the next; the last epoch has one anyway"""
    seed: Seed = 0
    """of weights, shuffle, crops and sampling"""

    def __post_init__(self) -> None:
        super().__post_init__()
        patch, size = self.sizes.patch_size, self.attention.image_size
        if size is not None and (size < patch or size % patch):
            raise UserError(
                f"--attention.image-size {size} must be a multiple of {patch} px, the patch size"
            )
        units = (self.sizes.grid // self.sizes.unit) ** 2
        patch_counts(units, self.join.mask_ratio, self.join.throw_ratio)
        if self.batch_size % self.crops_per_image:
            raise UserError(
                f"--batch-size {self.batch_size} crops are not made of images with "
                f"--crops-per-image {self.crops_per_image}"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into --accumulate "
                f"{self.accumulate} equal parts"
            )

    @property
    def slots(self) -> dict[str, Any]:
        """The slots of signals by name."""
        return {
            "frequency": self.frequency,
            "attention": self.attention,
            "hardness": self.hardness,
        }

    @property
    def weighs(self) -> bool:
        """Whether a signal weighs patches."""
        return not all(slot.is_off for slot in self.slots.values())

    @property
    def refreshed_kinds(self) -> list[str]:
        """Model scores that a job beside the training makes anew, each once."""
        slots = (self.frequency, self.attention)
        return list(dict.fromkeys(each.kind for each in slots if each.is_refreshed))

    @property
    def refreshes(self) -> range:
        """Epochs that begin with a generation of those scores being due."""
        if not self.refreshed_kinds or self.refresh.pin:
            return range(0)
        every = self.refresh.every or math.ceil(self.epochs / 10)
        return range(self.plain_epochs or every, self.epochs, every)

    @property
    def plain_until(self) -> int:
        """The epoch that weights begin with: not before the first generation if all signals are of
        it."""
        sources = {each.source for each in self.slots.values()} - {"off"}
        waits = all(each.startswith("refreshed") for each in sources) and not self.refresh.pin
        return self.plain_epochs or (self.refreshes.start if waits else 0)

    @property
    def cached_score(self) -> ScoreSpec | None:
        """The pixel score that all images must have, if one is read."""
        return self.spec if self.frequency.is_cached else None

    @property
    def sizes(self) -> ModelConfig:
        """The model's, and what the method and the options put in place of them."""
        names = (
            "image_size", "patch_size", "decoder_width", "decoder_depth", "decoder_heads", "unit",
            "normalise_targets", "low_pass",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        changes = {**METHODS[self.method].defaults, **given}
        if METHODS[self.method].has_decoder:
            changes["decoder"] = self.decoder
        return dataclasses.replace(MODELS[self.model], fused=self.fused, **changes)

    @property
    def plain(self) -> JoinConfig:
        """How the method masks where nothing is known of the patches: at random, none thrown."""
        return JoinConfig(mask_ratio=METHODS[self.method].plain_mask_ratio, throw_ratio=0.0)

    def differing(self) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """(dotted name, value, notes) of the options that are not as the code has them by default;
        an option that is new in the code is not among those of a run from before."""
        defaults = {name: value for name, value, _ in annotated(type(self)(**_UNSAID))}
        for name, value, notes in annotated(self):
            if value != defaults[name]:
                yield name, value, notes

    def without_effect(self) -> list[str]:
        """Options that were given and change nothing beside the others, each with the reason."""
        draws = "join.visible", "join.thrown", "join.blend", "join.loss_exponent"
        of_weights = (*(f"{name}." for name in self.slots), "spec.", "refresh.", *draws)
        never_due = bool(self.refreshed_kinds) and not self.refresh.pin and not self.refreshes
        rules: list[tuple[bool, tuple[str, ...], str]] = [
            (not self.weighs, of_weights, "no signal weighs patches"),
            (
                self.plain_epochs >= self.epochs,
                (*of_weights, "join."),
                f"all {self.epochs} epochs are of --plain-epochs",
            ),
            *(
                (slot.is_off, (f"{name}.",), "its source is off")
                for name, slot in self.slots.items()
            ),
            (
                not self.frequency.is_cached,
                ("spec.", "frequency.cached_exponent"),
                "none is cached",
            ),
            (
                self.frequency.is_cached and not self.frequency.is_refreshed,
                ("frequency.exponent", "frequency.kind"),
                "none is refreshed",
            ),
            (
                self.attention.source in ("live", "seen", "refreshed"),
                ("attention.every", "attention.image_size"),
                f"{self.attention.source} is not rolling",
            ),
            (not self.refreshed_kinds, ("refresh.",), "no score is refreshed"),
            (bool(self.refresh.pin), ("refresh.every", "refresh.wait"), "a generation is pinned"),
            (never_due, ("refresh.",), f"none is due in {self.epochs} epochs"),
            (
                self.join.visible == "uniform" or not self.join.throw_ratio,
                ("join.thrown",),
                "all others are visible or masked",
            ),
            (self.join.predicted_share == 1, ("join.predicted",), "all are predicted"),
            (
                not METHODS[self.method].has_decoder,
                ("decoder", "decoder_width", "decoder_depth", "decoder_heads"),
                f"{self.method} has no decoder",
            ),
            (not self.monitor, ("monitor_epochs",), "nothing is monitored"),
        ]
        given = {name for name, _, _ in self.differing() if not name.endswith(".source")}
        if never_due:
            given.add("refresh.every")
        found = []
        for name in sorted(given):
            for holds, options, reason in rules:
                if holds and (name in options or f"{name.split('.')[0]}." in options):
                    found.append(f"--{name.replace('_', '-')} ({reason})")
                    break
        return found


Options = TypeVar("Options", bound=Pretrain)

# They have no default: a recipe may give them; where it does not, the command line must.
_UNSAID: dict[str, Any] = {"shards": [], "cache": "", "out": Path()}


def parse(
    arguments: list[str],
    description: str | None,
    program: type[Options] = Pretrain,  # type: ignore[assignment]
) -> Options:
    """The command line; `--recipe` is read first, since it sets what the others default to.

    Raises:
        ValueError: the recipe is not there, or its file is wrong; names the file.
    """
    name = recipe.DEFAULT
    for position, argument in enumerate(arguments):
        if argument == "--recipe" and position + 1 < len(arguments):
            name = arguments[position + 1]
        elif argument.startswith("--recipe="):
            name = argument.partition("=")[2]
    told = _resolve(recipe.load(name), program)
    unsaid = {each: tyro.MISSING for each, value in _UNSAID.items() if getattr(told, each) == value}
    default = dataclasses.replace(told, recipe=name, **unsaid)
    about = f"{description or ''}\nRecipes:\n\n{recipe.overview()}"
    if {"-h", "--help"} & {*arguments}:
        short = _short(program)
        default = short(**vars(default))
        about = "\n\n".join((description or "").split("\n\n")[:2])
        about += f"\n\nRecipes: {', '.join(recipe.names())}\n\n--help-all shows all options."
        return tyro.cli(short, prog=called(), args=arguments, default=default, description=about)
    arguments = ["--help" if each == "--help-all" else each for each in arguments]
    arguments = program.with_suggestions(arguments)
    return tyro.cli(program, prog=called(), args=arguments, default=default, description=about)


def _short(program: type[Options]) -> type[Options]:
    """The same options, of which those noted `MAIN` alone are shown."""
    hints = get_type_hints(program, include_extras=True)
    hidden = [
        (each.name, Annotated[hints[each.name], tyro.conf.Suppress], each)
        for each in dataclasses.fields(program)
        if MAIN not in notes_of(program)[each.name]
    ]
    return dataclasses.make_dataclass(program.__name__, hidden, bases=(program,), frozen=True)


def _resolve(each: recipe.Recipe, program: type[Options]) -> Options:
    """The options of a program as a recipe sets them, on top of those that it builds on."""
    default = _resolve(each.extends, program) if each.extends else program(**_UNSAID)
    try:
        return tyro.cli(program, args=each.options, default=default)
    except SystemExit:  # tyro has said on stderr which option, and why
        raise UserError(f"{each.path}: options of the recipe are wrong, as told above") from None
