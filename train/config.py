"""The options of a pre-training run, and the recipes that set their defaults."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from famt.methods import METHODS
from famt.models import MODELS, Decoder, ModelConfig
from pipeline import storage
from pipeline.join import JoinConfig
from pipeline.loader import LoaderConfig, RandomView
from pipeline.scores import ScoreSpec

TIMM = "timm:"
"""What a source of initial weights begins with that is a name of timm's, and no path."""

Recipe = Literal["famt", "mae", "amt", "famt-paper", "famt-simmim", "simmim"]


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with cosine decay after a linear warm-up, as MAE pre-trains."""

    base_learning_rate: float = 1.5e-4
    """learning rate for 256 images a step; it grows with the effective batch"""
    weight_decay: float = 0.05
    """not applied to biases and norms"""
    warmup_epochs: float = 40.0
    """epochs of linear warm-up from 0"""
    clip_norm: float = 0.0
    """largest norm of all gradients together; 0 leaves them as they are"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the encoder as well, 0.9999 say; 0 keeps none"""


@dataclass(frozen=True)
class RollingConfig:
    """How `--attention rolling` keeps its maps fresh."""

    every: int = 8
    """a forward pass refreshes 1/every of each batch, the longest unseen first"""
    image_size: int | None = None
    """side of the crops in that pass, px, half the model's say; the model's own if left out"""


@dataclass(frozen=True)
class PeriodicConfig:
    """What `--attention periodic` weighs by: maps of whole images, made as the model learns."""

    every: int = 40
    """epochs from one generation of maps to the next"""
    kind: str = "famt"
    """famt (token frequency x attention), attention, cls_attention, token_frequency, or a kind that
    an installed package adds"""
    pin: str | None = None
    """use this one generation, <run>/<step> as `jobs/cache.py ls` lists it, and make none"""


@dataclass(frozen=True)
class RefreshJob:
    """What `--refresh ray` and `--refresh wait` give to the job that makes a generation."""

    workers: int | None = None
    """processes; as many as the cluster has room for if left out"""
    cpus_per_worker: int = 1
    """CPU cores, and decoding threads, of each"""
    gpus_per_worker: float = 0.0
    """share of a GPU for each"""


@dataclass(frozen=True)
class Pretrain:
    """A pre-training run."""

    shards: list[str]
    """tars, folders of tars, wildcards or brace patterns (in quotes)"""
    cache: str
    """folder or object-store URL of the score cache"""
    out: Path
    """folder of the run: checkpoints, log.jsonl, TensorBoard events"""
    recipe: Recipe = "famt"
    """sets the defaults of other options; see above"""
    init: str | None = None
    """begin with these weights in place of random ones: a run, an MAE checkpoint, a file or folder
    of timm or transformers, or timm:<name>"""
    method: Literal[tuple(METHODS)] = "mae"  # type: ignore[valid-type]
    """what is learned from masked images"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """widths and depths of encoder and decoder; nano and micro are made for 32-px images in 4-px
    patches, huge for 224 px in 14, the others for 224 px in 16"""
    image_size: int | None = None
    """side of the crops, px, in place of the model's"""
    patch_size: int | None = None
    """side of a patch, px, in place of the model's"""
    decoder: Decoder = "self"
    """self-attention as in MAE, or cross: masked patches look at visible ones only (CrossMAE)"""
    decoder_width: int | None = None
    """token width of the decoder, in place of the model's"""
    decoder_depth: int | None = None
    """blocks of the decoder, in place of the model's"""
    decoder_heads: int | None = None
    """attention heads of the decoder, in place of the model's"""
    unit: int | None = None
    """patches a side of the squares that are masked as a whole; SimMIM's are of 2, MAE's of 1"""
    normalise_targets: bool | None = None
    """predict each patch less its own mean, over its own deviation, as MAE does and SimMIM not"""
    low_pass: float | None = None
    """predict images without their finest detail (PixMIM): the largest frequency that is left, in
    waves an image side, 40 for 224 px say"""
    fused: tuple[int, ...] = ()
    """blocks, from 0, whose output reaches the decoder beside that of the last (MFF): 0 2 4 6 8 of
    vit_base say"""
    epochs: int = 800
    """passes over the data"""
    batch_size: int = 64
    """images a step on each rank"""
    accumulate: int = 1
    """parts that a batch goes through the model in, one after another, to save memory"""
    plain_epochs: int = 0
    """epochs of plain MAE (75 %% masked at random) before weights and throwing begin"""
    attention: Literal["off", "live", "rolling", "periodic"] = "rolling"
    """how the encoder's attention enters the weights: not at all, from a forward pass on every
    whole crop, from maps of which a part is refreshed each step, or from maps of whole images that
    a job beside the training makes every so many epochs"""
    attention_score: Literal["famt", "amt"] = "famt"
    """which formula reads a score off the attention, if it is live or rolling"""
    rolling: RollingConfig = field(default_factory=RollingConfig)
    periodic: PeriodicConfig = field(default_factory=PeriodicConfig)
    refresh: Literal["follow", "ray", "wait"] = "follow"
    """who makes periodic maps: a `jobs/refresh_scores.py --follow <out>` that you run, or a job
    that the training starts on Ray; wait also waits for it"""
    refresh_job: RefreshJob = field(default_factory=RefreshJob)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    view: RandomView = field(default_factory=RandomView)
    spec: ScoreSpec = field(default_factory=ScoreSpec)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """how crops are resized"""
    shuffle_buffer: int = 4096
    """encoded images held to draw from at random"""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 computes under autocast; it pays on GPUs and, for wide models, on recent CPUs"""
    compile: bool = False
    """compile the model (torch.compile)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """what to train on"""
    threads: int = LoaderConfig.threads
    """CPU threads that decode, on each rank"""
    resume: Literal["auto", "never"] = "auto"
    """go on from the last checkpoint in --out, or refuse a folder that holds one"""
    elastic: bool = False
    """resume with other shards, scores, batch size or ranks too, from the beginning of the epoch"""
    checkpoint_minutes: float = 10.0
    """time between checkpoints; one is written at the end and on SIGTERM or SIGUSR1 as well"""
    keep_checkpoints: int = 2
    """how many of the last checkpoints stay"""
    log_steps: int = 20
    """steps between log points, and between the moments at which a run can be checkpointed"""
    picture_epochs: int = 20
    """epochs between pictures of crops, weights, splits and reconstructions in TensorBoard; 0 for
    none"""
    seed: int = 0
    """of weights, shuffle, crops and sampling"""

    def __post_init__(self) -> None:
        smallest: dict[str, tuple[float, float]] = {
            "epochs": (self.epochs, 1),
            "batch_size": (self.batch_size, 1),
            "accumulate": (self.accumulate, 1),
            "log_steps": (self.log_steps, 1),
            "keep_checkpoints": (self.keep_checkpoints, 1),
            "threads": (self.threads, 1),
            "rolling.every": (self.rolling.every, 1),
            "periodic.every": (self.periodic.every, 1),
            "spec.grid": (self.spec.grid, 2),
            "spec.pixels_per_cell": (self.spec.pixels_per_cell, 1),
            "plain_epochs": (self.plain_epochs, 0),
            "picture_epochs": (self.picture_epochs, 0),
            "checkpoint_minutes": (self.checkpoint_minutes, 0),
            "shuffle_buffer": (self.shuffle_buffer, 0),
            "join.frequency_exponent": (self.join.frequency_exponent, 0),
            "join.attention_exponent": (self.join.attention_exponent, 0),
            "optimiser.base_learning_rate": (self.optimiser.base_learning_rate, 0),
            "optimiser.weight_decay": (self.optimiser.weight_decay, 0),
            "optimiser.warmup_epochs": (self.optimiser.warmup_epochs, 0),
            "optimiser.clip_norm": (self.optimiser.clip_norm, 0),
            "optimiser.ema_decay": (self.optimiser.ema_decay, 0),
        }
        for name, (value, least) in smallest.items():
            if not least <= value < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} must be a number of at least {least}"
                )
        if self.optimiser.ema_decay >= 1:
            raise ValueError(f"--optimiser.ema-decay {self.optimiser.ema_decay} must be below 1")
        patch, size = self.sizes.patch_size, self.rolling.image_size
        if size is not None and (size < patch or size % patch):
            raise ValueError(
                f"--rolling.image-size {size} must be a multiple of {patch} px, the patch size"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} does not divide into --accumulate "
                f"{self.accumulate} equal parts"
            )

    @property
    def sizes(self) -> ModelConfig:
        """The model's, and what the method and the options put in place of them."""
        names = (
            "image_size", "patch_size", "decoder_width", "decoder_depth", "decoder_heads", "unit",
            "normalise_targets", "low_pass",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        changes = METHODS[self.method].defaults | given
        return dataclasses.replace(
            MODELS[self.model], decoder=self.decoder, fused=self.fused, **changes
        )

    def describe(self) -> dict[str, Any]:
        """The options as plain data, as checkpoints keep them."""
        options = dataclasses.asdict(self.absolute())
        plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
        return plain

    def absolute(self) -> Pretrain:
        """The same options with paths that hold in any working directory."""
        return dataclasses.replace(
            self,
            shards=[storage.normalise_url(pattern) for pattern in self.shards],
            cache=storage.normalise_url(self.cache),
            out=self.out.absolute(),
            init=self.init
            if self.init is None or self.init.startswith(TIMM)
            else storage.normalise_url(self.init),
        )


Options = TypeVar("Options", bound=Pretrain)

RECIPES: dict[str, dict[str, Any]] = {
    "famt": {},
    "mae": {
        "join": JoinConfig(mask_ratio=0.75, throw_ratio=0.0, frequency_exponent=0.0),
        "attention": "off",
    },
    "amt": {
        "join": JoinConfig(frequency_exponent=0.0),
        "attention": "periodic",
        "plain_epochs": 40,
        "periodic": PeriodicConfig(kind="cls_attention"),
    },
    "famt-paper": {
        "join": JoinConfig(frequency_exponent=0.0),
        "attention": "periodic",
        "plain_epochs": 40,
        "periodic": PeriodicConfig(kind="famt"),
    },
    "famt-simmim": {
        "method": "simmim",
        "join": JoinConfig(mask_ratio=0.44, throw_ratio=0.26),
    },
    "simmim": {
        "method": "simmim",
        "join": JoinConfig(mask_ratio=0.6, throw_ratio=0.0, frequency_exponent=0.0),
        "attention": "off",
    },
}

PLAIN_MAE: JoinConfig = RECIPES["mae"]["join"]


def parse(
    arguments: list[str],
    description: str | None,
    program: type[Options] = Pretrain,  # type: ignore[assignment]
) -> Options:
    """The command line; `--recipe` is read first, since it sets what the others default to."""
    recipe = "famt"
    for position, argument in enumerate(arguments):
        if argument == "--recipe" and position + 1 < len(arguments):
            recipe = arguments[position + 1]
        elif argument.startswith("--recipe="):
            recipe = argument.partition("=")[2]
    default = program(
        shards=tyro.MISSING,
        cache=tyro.MISSING,
        out=tyro.MISSING,
        **RECIPES.get(recipe, {}),
    )
    return tyro.cli(program, args=arguments, default=default, description=description)
