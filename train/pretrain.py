"""Pre-train a masked autoencoder on scored shards.

    python -m train.pretrain --shards 'shards/train-*.tar' --cache scores/ --out runs/first
    torchrun --nproc-per-node 8 -m train.pretrain --shards ... --cache ... --out ... \\
        --model vit_base --batch-size 512 --epochs 800

`--recipe famt` (45 % masked by weight, 40 % thrown) or `--recipe mae` (75 % masked at random) sets
the defaults; single options override them. A run goes on from the last checkpoint in `--out`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from famt.attention import attention_scores, last_attention
from famt.mae import MODELS, MaskedAutoencoder
from famt.patches import normalise, normalise_images
from famt.sampling import patch_counts
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, PatchBatch, join_weights, split_crops
from pipeline.loader import CropBatch, CropLoader, LoaderConfig, RandomView
from pipeline.scores import ScoreSpec
from pipeline.table import ScoreTable, load_table
from train import checkpoint
from train.checkpoint import Checkpoint
from train.distributed import Ranks, ranks
from train.program import run_program

Recipe = Literal["famt", "mae"]
RECIPES: dict[str, JoinConfig] = {
    "famt": JoinConfig(mask_ratio=0.45, throw_ratio=0.40),
    "mae": JoinConfig(mask_ratio=0.75, throw_ratio=0.0, frequency_exponent=0.0),
}


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with cosine decay after a linear warm-up, as MAE pre-trains."""

    base_learning_rate: float = 1.5e-4
    """learning rate for 256 images a step; it grows with the effective batch"""
    weight_decay: float = 0.05
    """not applied to biases and norms"""
    warmup_epochs: float = 40.0
    """epochs of linear warm-up from 0"""


@dataclass(frozen=True)
class Pretrain:
    """A pre-training run."""

    shards: list[str]
    """tars, folders of tars, wildcards or brace patterns (in quotes)"""
    cache: str
    """folder or object-store URL of the score cache"""
    out: Path
    """folder of the run: checkpoints and TensorBoard events"""
    recipe: Recipe = "famt"
    """sets the defaults of --join; see above"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """encoder and decoder; the names on _32 take 32-px images"""
    epochs: int = 800
    """passes over the data"""
    batch_size: int = 64
    """images a step on each rank"""
    attention: Literal["off", "live"] = "off"
    """live weighs patches by the current encoder's attention on every whole crop as well"""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """what to train on"""
    threads: int = LoaderConfig.threads
    """CPU threads that decode, on each rank"""
    checkpoint_minutes: float = 10.0
    """time between checkpoints; one is written at the end of the run in any case"""
    log_steps: int = 20
    """steps between log points"""
    seed: int = 0
    """of weights, shuffle, crops and sampling"""


def main(config: Pretrain) -> None:
    """Train until `config.epochs` are done, going on from the last checkpoint if there is one."""
    with ranks(config.device) as here:
        Run(config, here).train()


class Run:
    """Everything a run holds, and the loop over it."""

    def __init__(self, config: Pretrain, here: Ranks) -> None:
        self.config, self.here = config, here
        if config.log_steps < 1 or config.epochs < 1:
            raise ValueError("--log-steps and --epochs must be at least 1")
        found = checkpoint.latest(config.out)
        resumed = checkpoint.load(found) if found else None
        if resumed:
            _refuse_another_run(resumed, config, here, found)

        torch.manual_seed(config.seed)
        self.sizes = MODELS[config.model]
        self.model = MaskedAutoencoder(self.sizes).to(here.device)
        self.generator = torch.Generator(here.device).manual_seed(
            config.seed * here.world_size + here.rank
        )
        weighs = config.join.frequency_exponent != 0
        self.table: ScoreTable = load_table(
            config.shards, ScoreCache(config.cache), config.spec if weighs else None
        )
        self.loader = CropLoader(
            self.table,
            LoaderConfig(
                batch_size=config.batch_size,
                image_size=self.sizes.image_size,
                view=config.view,
                interpolation=config.interpolation,
                shuffle_buffer=config.shuffle_buffer,
                threads=config.threads,
            ),
            drop_last=True,
            rank=here.rank,
            world_size=here.world_size,
            device=here.device,
            seed=config.seed,
            state=resumed.loaders[here.rank] if resumed else None,
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.effective_batch = config.batch_size * here.world_size
        self.learning_rate = config.optimiser.base_learning_rate * self.effective_batch / 256
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(self.model, config.optimiser.weight_decay),
            lr=self.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        warmup_steps = min(
            round(config.optimiser.warmup_epochs * self.steps_per_epoch), self.total_steps // 2
        )
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_steps - warmup_steps,
            warmup_t=warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.warmup_steps = warmup_steps
        self.step = 0
        if resumed:
            self.model.load_state_dict(resumed.model)
            self.optimizer.load_state_dict(resumed.optimizer)
            self.generator.set_state(resumed.generators[here.rank])
            self.step = resumed.step
        config.out.mkdir(parents=True, exist_ok=True)
        self.trained: nn.Module = (
            DistributedDataParallel(self.model) if here.world_size > 1 else self.model
        )

    def train(self) -> None:
        """Run the remaining epochs, then write the last checkpoint."""
        if self.here.is_main:
            print(self.plan(), flush=True)
        log = _Log(self) if self.here.is_main else None
        saved, started_at = time.monotonic(), self.step
        self.model.train()
        while self.loader.epoch < self.config.epochs:
            waiting = time.perf_counter()
            for crops in self.loader:
                waited = time.perf_counter() - waiting
                loss = self.train_step(self.patches(crops))
                if self.step % self.config.log_steps == 0 or self.step == self.total_steps:
                    self._refuse_nan(loss, crops)
                    if log:
                        log.point(loss.item(), self.optimizer.param_groups[0]["lr"])
                if log:
                    log.step(waited)
                if self.step % self.config.log_steps == 0:
                    due = time.monotonic() - saved > self.config.checkpoint_minutes * 60
                    if self.here.gather(due)[0]:
                        self.save()
                        saved = time.monotonic()
                waiting = time.perf_counter()
        if self.step > started_at:
            self.save()
        if log:
            log.close()

    def patches(self, crops: CropBatch) -> PatchBatch:
        """Weigh, sample and gather: from crops to what the model takes."""
        attention = None
        if self.config.attention == "live":
            with self._autocast():
                seen = last_attention(self.model.encoder, normalise_images(crops.images))
            attention = attention_scores(seen)
        weights = join_weights(crops, self.table, self.sizes.grid, self.config.join, attention)
        return split_crops(
            crops, self.table, weights, self.sizes.patch_size, self.config.join, self.generator
        )

    def train_step(self, batch: PatchBatch) -> torch.Tensor:
        """One optimiser step; returns the loss, still on the device."""
        self.schedule.step_update(self.step)
        with self._autocast():
            loss = self.trained(normalise(batch.visible), normalise(batch.masked), batch.split)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write a checkpoint of all ranks' state; every rank calls this."""
        loaders = self.here.gather(self.loader.state())
        generators = self.here.gather(self.generator.get_state())
        if self.here.is_main:
            state = Checkpoint(
                step=self.step,
                model_name=self.config.model,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                loaders=loaders,
                generators=generators,
                config=describe(self.config, self.here),
            )
            checkpoint.save(self.config.out, state)

    def plan(self) -> str:
        """Every number of the run that follows from its options, for a reader to check."""
        config, join = self.config, self.config.join
        masked, thrown, visible = patch_counts(
            self.sizes.grid**2, join.mask_ratio, join.throw_ratio
        )
        parameters = {
            "encoder": sum(p.numel() for p in self.model.encoder.parameters()),
            "in all": sum(p.numel() for p in self.model.parameters()),
        }
        lines = {
            "run": f"{config.out} on {self.here.device}, {self.here.world_size} rank(s), "
            f"{config.precision}",
            "model": f"{config.model}: "
            + ", ".join(f"{n / 1e6:.1f} M parameters {name}" for name, n in parameters.items()),
            "data": f"{len(self.table)} images in {len(self.table.urls)} shards; "
            f"{self.loader.remainder} skipped each epoch to fill whole batches",
            "weights": ("cached " + config.spec.id if self.table.maps is not None else "uniform")
            + (", live attention" if config.attention == "live" else ""),
            "patches": f"{self.sizes.grid**2} = {masked} masked + {thrown} thrown + "
            f"{visible} visible",
            "steps": f"{self.total_steps} = {config.epochs} epochs x {self.steps_per_epoch}, "
            f"{self.warmup_steps} of warm-up; {self.step} done",
            "batch": f"{self.effective_batch} = {config.batch_size} x {self.here.world_size}",
            "learning rate": f"{self.learning_rate:.3g} at its peak = "
            f"{config.optimiser.base_learning_rate:.3g} x {self.effective_batch} / 256",
        }
        return "\n".join(f"{name:14}{text}" for name, text in lines.items())

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=bf16)

    def _refuse_nan(self, loss: torch.Tensor, crops: CropBatch) -> None:
        if not math.isfinite(loss.item()):
            path = self.config.out / f"nan-rank{self.here.rank}-step{self.step:08d}.txt"
            path.write_text("\n".join(self.table.key(row) for row in crops.rows.tolist()) + "\n")
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}; the samples are in {path}. "
                "Lower --optimiser.base-learning-rate, or look at those images"
            )


class _Log:
    """Progress bar and TensorBoard of the main rank."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._writer = SummaryWriter(str(run.config.out), purge_step=run.step)
        self._bar = tqdm(
            total=run.total_steps, initial=run.step, desc="pretrain", unit="step", mininterval=1
        )
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def step(self, waited: float) -> None:
        self._waited += waited
        self._steps += 1
        self._bar.update()

    def point(self, loss: float, learning_rate: float) -> None:
        seconds = time.perf_counter() - self._since
        scalars = {
            "loss": loss,
            "learning_rate": learning_rate,
            "images_per_second": max(1, self._steps) * self._run.effective_batch / seconds,
            "data_wait_share": self._waited / seconds,
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, self._run.step)
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {scalars['images_per_second']:.0f} images/s, "
            f"{scalars['data_wait_share']:.0%} waiting for data"
        )
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


def describe(config: Pretrain, here: Ranks) -> dict[str, Any]:
    """The configuration as plain data, as checkpoints keep it; `auto` says what was chosen."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {**plain, "device": here.device.type}


# What may differ between a run and its continuation.
_FREE = ("out", "cache", "shards", "threads", "checkpoint_minutes", "log_steps")


def _refuse_another_run(
    resumed: Checkpoint, config: Pretrain, here: Ranks, found: Path | None
) -> None:
    then, now = resumed.config, describe(config, here)
    changed = [name for name in now if name not in _FREE and then.get(name) != now[name]]
    if len(resumed.loaders) != here.world_size:
        raise ValueError(
            f"{found} was written by {len(resumed.loaders)} ranks and this run has "
            f"{here.world_size}; use as many, or another --out"
        )
    if changed:
        differences = "; ".join(f"{name}: {then.get(name)} -> {now[name]}" for name in changed)
        raise ValueError(
            f"{found} belongs to a run with other options ({differences}); use the same, or "
            "another --out"
        )


def parse(arguments: list[str]) -> Pretrain:
    """The command line; `--recipe` is read first, since it sets what the others default to."""
    recipe = "famt"
    for position, argument in enumerate(arguments):
        if argument == "--recipe" and position + 1 < len(arguments):
            recipe = arguments[position + 1]
        elif argument.startswith("--recipe="):
            recipe = argument.partition("=")[2]
    default = Pretrain(
        shards=tyro.MISSING,
        cache=tyro.MISSING,
        out=tyro.MISSING,
        join=RECIPES.get(recipe, JoinConfig()),
    )
    return tyro.cli(Pretrain, args=arguments, default=default, description=__doc__)


if __name__ == "__main__":
    run_program(main, parse(sys.argv[1:]))
