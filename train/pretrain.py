"""Pre-train a masked autoencoder on scored shards.

    python -m train.pretrain --shards 'shards/train-*.tar' --cache scores/ --out runs/first
    torchrun --nproc-per-node 8 -m train.pretrain --shards ... --cache ... --out ... \\
        --model vit_base --batch-size 512 --epochs 800 --precision bf16

`--recipe` sets the defaults of other options, which still override it: the name of one of those
below, or the path of a file of your own.

A run goes on from the last checkpoint in `--out`. SIGTERM and SIGUSR1 make it write one and leave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from famt.methods import METHODS
from famt.models import ModelConfig
from famt.patches import normalise
from famt.sampling import patch_counts
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, PatchBatch, split_crops
from pipeline.loader import CropBatch, CropLoader, LoaderConfig
from pipeline.stage import stage_shards
from pipeline.table import load_samples
from train import checkpoint, figures
from train.checkpoint import Checkpoint
from train.config import Pretrain, parse
from train.distributed import Ranks, ranks
from train.evaluate.monitor import Monitor
from train.initial import load_initial
from train.loop import Training
from train.program import run_program
from train.signals.following import FollowedMaps
from train.signals.signal import Context, Signal, Taken
from train.signals.weights import Scores, build_signals, read_signals, weigh
from train.streams import SideStream, Stop
from train.timing import Clock


def main(config: Pretrain) -> None:
    """Train until `config.epochs` are done, going on from the last checkpoint if there is one."""
    with (
        ranks(config.device) as here,
        checkpoint.own(config.out) if here.is_main else contextlib.nullcontext(),
        Stop(here.lifeline) as stop,
    ):
        Run(config, here).train(stop)


class Run(Training[PatchBatch]):
    """A pre-training run: everything it holds, and what a step of it is."""

    name = "pretrain"

    def __init__(self, config: Pretrain, here: Ranks) -> None:
        self.config, self.here = config, here
        self.out, self.log_steps = config.out, config.log_steps
        self.checkpoint_minutes = config.checkpoint_minutes
        self.sizes = config.sizes
        self.clock = Clock(here.device)
        self.side = SideStream(here.device)
        scored = config.spec if config.content.source.startswith("cached") else None
        cache = ScoreCache(config.cache, create=scored is None)
        self.samples = here.share(lambda: load_samples(config.shards, cache, scored))
        resumed, exact = checkpoint.resume(config, self.identity(), here)
        self.id: str = resumed.run if resumed else here.gather(f"run-{uuid.uuid4().hex[:12]}")[0]

        torch.manual_seed(config.seed)
        self.model = METHODS[config.method](self.sizes).to(here.device)
        self.began_with = (
            load_initial(self.model, config.init) if config.init and not resumed else None
        )
        first_epoch = resumed.epoch if resumed else 0
        own = resumed.ranks[here.rank] if resumed and exact else None
        self.generator = torch.Generator(here.device).manual_seed(
            (config.seed + first_epoch) * here.world_size + here.rank
        )
        self.loader = CropLoader(
            self.samples,
            LoaderConfig(
                batch_size=config.batch_size,
                image_size=self.sizes.image_size,
                view=config.view,
                interpolation=config.interpolation,
                shuffle_buffer=config.shuffle_buffer,
                threads=config.threads,
                crops_per_image=config.crops_per_image,
                decode=config.decode,
            ),
            drop_last=True,
            paths=stage_shards(self.samples, cache, config.stage, show=here.is_main)
            if config.stage
            else None,
            rank=here.rank,
            world_size=here.world_size,
            device=here.device,
            seed=config.seed,
            first_epoch=first_epoch,
            state=own["loader"] if own else None,
        )
        encoder = self.model.encoder
        followed = (
            FollowedMaps(self.id, config, self.samples, cache, encoder, here)
            if config.refreshed_kinds
            else None
        )
        self.context = Context(
            self.id, config, self.samples, cache, self.sizes.grid, encoder, here, followed
        )
        self.signals: list[Signal] = build_signals(self.context)
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
        self.warmup_steps = min(
            round(config.optimiser.warmup_epochs * self.steps_per_epoch), self.total_steps // 2
        )
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_steps - self.warmup_steps,
            warmup_t=self.warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        decay = config.optimiser.ema_decay
        self.ema = ModelEmaV3(encoder, decay) if decay else None
        self.monitor = (
            Monitor(config.monitor, cache, self.sizes, config.threads, here)
            if config.monitor and here.is_main
            else None
        )
        self.step = 0
        self.schedule_start = 0
        if resumed:
            self._restore(resumed, exact)
        trained: nn.Module = self.model
        self._no_sync: Callable[[], AbstractContextManager] = contextlib.nullcontext
        if here.world_size > 1:
            trained = parallel = DistributedDataParallel(trained, gradient_as_bucket_view=True)
            self._no_sync = parallel.no_sync
        if config.compile:  # after the former, whose buckets it then computes in parallel
            trained = torch.compile(trained)  # type: ignore[assignment]
        self.trained: nn.Module = trained
        self.model.train()

    @property
    def last_step(self) -> int:
        return self.schedule_start + self.total_steps

    def begin_epoch(self, epoch: int, stop: Stop) -> bool:
        return all(each.begin_epoch(epoch, self.step, stop, self.log) for each in self.signals)

    def prepare(self, crops: CropBatch, step: int) -> PatchBatch:
        """Weigh, sample and gather: from crops to what the model takes."""
        with self.clock.stage("signals"):
            scores = {} if self._plain else read_signals(self.signals, crops, step)
        with self.clock.stage("join"):
            join = self._join(scores)
            weights = weigh(scores, crops, self.sizes.grid)
            progress = (step - self.schedule_start) / self.total_steps
            batch = split_crops(crops, weights, self.sizes, join, self.generator, progress)
            return self.side.hand_over(batch)

    def forward_backward(self, batch: PatchBatch) -> Tensor:
        self.side.join()
        parts = batch.chunk(self.config.accumulate)
        total = torch.zeros((), device=self.here.device)
        errors = []
        now, no_sync = contextlib.nullcontext, self._no_sync
        for number, part in enumerate(parts, start=1):
            # The ranks' gradients are averaged once, with the last part.
            with now() if number == len(parts) else no_sync():
                with self.clock.stage("forward"), self._autocast():
                    visible, masked = normalise(part.visible), normalise(part.masked)
                    loss = self.trained(visible, masked, part.split, part.loss_weights) / len(parts)
                with self.clock.stage("backward"):
                    loss.backward()
            total += loss.detach()
            errors.append(self.model.patch_errors)
        if self.signals:
            with self.clock.stage("signals"):
                taken = Taken(batch.views, batch.split, torch.cat(errors), self.step)
                for signal in self.signals:
                    signal.learn(taken)
        return total

    def update(self) -> None:
        self.side.join()
        with self.clock.stage("update"):
            self.schedule.step_update(self.step - self.schedule_start)
            if self.config.optimiser.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimiser.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema:
                self.ema.update(self.model.encoder)
        self.side.weights_are_ready()
        self.step += 1

    def scalars(self) -> dict[str, float]:
        scalars = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        for signal in self.signals:
            scalars |= signal.scalars()
        return scalars

    def end_epoch(self, epoch: int) -> None:
        for signal in self.signals:
            signal.synchronise()
        if self.config.monitor and self._monitor_is_due(epoch):
            self.side.join()
            if self.monitor and self.log:
                with self.clock.stage("monitor", on_host=True):
                    self.monitor.look(self.model.encoder, self.step, self.log)
            self.here.gather(None)  # gradients would wait ten minutes at most

    def save(self) -> None:
        for signal in self.signals:
            signal.synchronise()
        of_ranks = self.here.gather(
            {"loader": self.loader.state(), "generator": self.generator.get_state()}
        )
        if self.here.is_main:
            state = Checkpoint(
                run=self.id,
                step=self.step,
                schedule_start=self.schedule_start,
                epoch=(self.step - self.schedule_start) // self.steps_per_epoch,
                method=self.config.method,
                sizes=dataclasses.asdict(self.sizes),
                model=self.model.state_dict(),
                ema=self.ema.module.state_dict() if self.ema else None,
                optimizer=self.optimizer.state_dict(),
                signals={each.name: each.state() for each in self.signals},
                ranks=of_ranks,
                config={**self.describe(), **self.identity()},
            )
            path = checkpoint.save(self.out, state, self.config.keep_checkpoints)
            if self.log:
                self.log.event(self.step, "checkpoint", file=path.name)
        self.here.gather(None)  # a slow disk is waited for here; gradients wait ten minutes at most
        for signal in self.signals:
            signal.saved(self.step, self.log)

    def close(self, *, finished: bool) -> None:
        for signal in self.signals:
            signal.close(finished=finished)

    def identity(self) -> dict[str, Any]:
        return {
            "device": self.here.device.type,
            "world_size": self.here.world_size,
            "data": self.samples.digest,
        }

    def describe(self) -> dict[str, Any]:
        return self.config.describe()

    def picture(self, crops: CropBatch, epoch: int) -> Image.Image | None:
        """Crops with their signals, weights, split and reconstruction, as the run makes them."""
        every = self.config.picture_epochs
        if not every or epoch % every:
            return None
        self.side.join()
        scores = {} if self._plain else read_signals(self.signals, crops, self.step, look=True)
        return figures.picture(self.model, crops, scores, self._join(scores))

    def plan(self) -> str:
        config, sizes = self.config, self.sizes
        parameters = {
            "encoder": sum(p.numel() for p in self.model.encoder.parameters()),
            "in all": sum(p.numel() for p in self.model.parameters()),
        }
        lines = {
            "run": f"{config.out} on {self.here.device}, {self.here.world_size} rank(s), "
            f"{config.precision}",
            "model": f"{config.method}, {config.model} on {sizes.image_size} px in patches of "
            f"{sizes.patch_size} px, {config.decoder} decoder: "
            + ", ".join(f"{n / 1e6:.1f} M parameters {name}" for name, n in parameters.items()),
            "data": f"{len(self.samples)} images in {len(self.samples.urls)} shards; "
            f"{self.loader.remainder} skipped each epoch to fill whole batches"
            + (f"; {config.crops_per_image} crops of each" if config.crops_per_image > 1 else ""),
            **{each.name: each.describe() for each in self.signals},
            "patches": _counts(sizes, config.join)
            + ("" if self.signals else ", all of the same weight"),
            "steps": f"{self.total_steps} = {config.epochs} epochs x {self.steps_per_epoch}, "
            f"{self.warmup_steps} of warm-up; {self.step - self.schedule_start} done",
            "batch": f"{self.effective_batch} = {config.batch_size} x {self.here.world_size} "
            f"rank(s), in {config.accumulate} part(s)",
            "learning rate": f"{self.learning_rate:.3g} at its peak = "
            f"{config.optimiser.base_learning_rate:.3g} x {self.effective_batch} / 256",
        }
        if self.began_with:
            lines["begins with"] = f"{config.init}\n{self.began_with.describe()}"
        if self.ema:
            lines["average"] = f"of the encoder, decay {config.optimiser.ema_decay:g}"
        if config.plain_epochs:
            lines["before"] = (
                f"{config.plain_epochs} epochs of plain masking, {_counts(sizes, config.plain)}"
            )
        return "\n".join(f"{name:14}{text}" for name, text in lines.items())

    def _join(self, scores: Scores) -> JoinConfig:
        """Signals that have nothing to say yet leave the run what it is without weights."""
        plain = self._plain or (self.signals and not scores)
        return self.config.plain if plain else self.config.join

    def _monitor_is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.monitor_epochs == 0 or self.step == self.last_step

    @property
    def _plain(self) -> bool:
        """Whether the epoch is one of those before the weights begin."""
        return self.loader.epoch < self.config.plain_epochs

    def _restore(self, resumed: Checkpoint, exact: bool) -> None:
        self.step = resumed.step
        self.model.load_state_dict(resumed.model)
        options = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(resumed.optimizer)
        if self.ema and resumed.ema:
            self.ema.module.load_state_dict(resumed.ema)
        if exact:
            self.generator.set_state(resumed.ranks[self.here.rank]["generator"])
            self.schedule_start = resumed.schedule_start
        else:
            # Steps only grow, or a checkpoint would be older than those it follows.
            self.schedule_start = resumed.step - resumed.epoch * self.steps_per_epoch
            for group, now in zip(self.optimizer.param_groups, options, strict=True):
                group.update({name: now[name] for name in now if name != "params"})
        same_rows = resumed.config["data"] == self.samples.digest
        for signal in self.signals:
            if signal.name in resumed.signals:
                state = resumed.signals[signal.name]
                signal.load_state(state, epoch=resumed.epoch, exact=exact, same_rows=same_rows)

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=bf16)


def _counts(sizes: ModelConfig, join: JoinConfig) -> str:
    patches = sizes.unit**2
    masked, thrown, visible = (
        patches * units
        for units in patch_counts(sizes.grid**2 // patches, join.mask_ratio, join.throw_ratio)
    )
    predicted = max(1, int(masked * join.predicted_share))
    how = f", in squares of {sizes.unit} x {sizes.unit}" if sizes.unit > 1 else ""
    return (
        f"{sizes.grid**2} = {masked} masked ({predicted} predicted) + {thrown} thrown + "
        f"{visible} visible{how}"
    )


if __name__ == "__main__":
    run_program(lambda arguments: main(parse(arguments, __doc__)), sys.argv[1:])
