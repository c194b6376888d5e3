"""Pre-train a masked autoencoder on scored shards.

    python -m train.pretrain --shards 'shards/train-*.tar' --cache scores/ --out runs/first
    torchrun --nproc-per-node 8 -m train.pretrain --shards ... --cache ... --out ... \\
        --model vit_base --batch-size 512 --epochs 800 --precision bf16

`--recipe` sets the defaults of other options, which still override it:

    famt        45 % masked by cached frequency score and rolling attention, 40 % thrown
    mae         75 % masked at random, nothing thrown
    amt         plain MAE for 40 epochs, then 45 % masked by AMT's attention score of whole images,
                made anew every 40 epochs by a job beside the training; 40 % thrown
    famt-paper  the same with the paper's weight, token frequency x attention
    famt-simmim SimMIM, 44 % of its units masked by the weights of famt, 26 % thrown
    simmim      SimMIM, 60 % masked at random, nothing thrown

A run goes on from the last checkpoint in `--out`. SIGTERM and SIGUSR1 make it write one and leave.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from famt.methods import METHODS
from famt.models import ModelConfig
from famt.patches import normalise
from famt.sampling import patch_counts
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, PatchBatch, join_weights, split_crops
from pipeline.loader import CropBatch, CropLoader, LoaderConfig
from pipeline.table import load_maps, load_samples
from train import checkpoint, figures
from train.attention import LiveAttention, RollingAttention
from train.checkpoint import Checkpoint
from train.config import PLAIN_MAE, Pretrain, parse
from train.distributed import Ranks, ranks
from train.initial import load_initial
from train.log import Log
from train.program import run_program
from train.refresh import PeriodicAttention
from train.streams import SideStream, Stop
from train.timing import Clock

_SHOWN = 6  # crops in a picture


def main(config: Pretrain) -> None:
    """Train until `config.epochs` are done, going on from the last checkpoint if there is one."""
    with (
        ranks(config.device) as here,
        checkpoint.own(config.out) if here.is_main else contextlib.nullcontext(),
        Stop(here.lifeline) as stop,
    ):
        Run(config, here).train(stop)


class Run:
    """Everything a run holds, and the loop over it."""

    def __init__(self, config: Pretrain, here: Ranks) -> None:
        self.config, self.here = config, here
        self.sizes = config.sizes
        self.clock = Clock(here.device)
        self.side = SideStream(here.device)
        weighs = config.join.frequency_exponent != 0
        cache = ScoreCache(config.cache, create=not weighs)
        self.table = here.share(
            lambda: load_samples(config.shards, cache, config.spec if weighs else None)
        )
        self.maps = (
            here.share(lambda: load_maps(self.table, cache, config.spec)) if weighs else None
        )
        resumed, exact = checkpoint.resume(config, self._identity(), here)
        self.id: str = resumed.run if resumed else here.gather(f"run-{uuid.uuid4().hex[:12]}")[0]

        torch.manual_seed(config.seed)
        self.model = METHODS[config.method](self.sizes).to(here.device)
        self.began_with = (
            load_initial(self.model, config.init) if config.init and not resumed else None
        )
        first_epoch = resumed.epoch if resumed else 0
        self.generator = torch.Generator(here.device).manual_seed(
            (config.seed + first_epoch) * here.world_size + here.rank
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
            first_epoch=first_epoch,
            state=resumed.loaders[here.rank] if resumed and exact else None,
        )
        live = LiveAttention(
            self.model.encoder,
            config.attention_score,
            config.rolling.image_size if config.attention == "rolling" else None,
            config.accumulate,
            config.precision == "bf16",
        )
        self.rolling = (
            RollingAttention(live, len(self.table), self.sizes.grid, config.rolling, here)
            if config.attention == "rolling"
            else None
        )
        self.periodic = (
            PeriodicAttention(config, self.id, self.table, self.sizes.grid, here)
            if config.attention == "periodic"
            else None
        )
        # Crops and the step they are for -> scores [B, N] of their patches, or None so far.
        self.attend: Callable[[CropBatch, int], torch.Tensor | None] | None = None
        if config.attention == "live":
            self.attend = lambda crops, _: live(crops.images)
        elif self.rolling:
            self.attend = self.rolling
        elif self.periodic:
            self.attend = self.periodic.read
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
        self.ema = ModelEmaV3(self.model.encoder, decay) if decay else None
        self.step = 0
        self.schedule_start = 0  # step at which the schedule, as it is now, would have begun
        self.shown: CropBatch | None = None
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

    @property
    def last_step(self) -> int:
        """The step that the run ends with."""
        return self.schedule_start + self.total_steps

    def train(self, stop: Stop) -> None:
        """Run the remaining epochs, then write the last checkpoint; or stop early when asked to."""
        config, here = self.config, self.here
        log = None
        if here.is_main:
            print(self.plan(), flush=True)
            log = Log(config.out, self.step, self.last_step, self.effective_batch, self.clock)
            log.event(self.step, "start", run=self.id, epoch=self.loader.epoch, **self._identity())
        saved_at, saved_step = time.monotonic(), self.step
        recent: list[tuple[torch.Tensor, torch.Tensor]] = []  # losses and rows since a log point
        self.model.train()
        while self.step < self.last_step:
            epoch, crops = self.loader.epoch, iter(self.loader)
            if self.periodic and self.loader.step == 0:
                encoder = self.model.encoder
                if not self.periodic.begin_epoch(epoch, self.step, encoder, stop, log):
                    self.save(log)
                    self._close(log, finished=False)
                    return
            batch = self._next(crops, self.step)
            if log and self.shown and config.picture_epochs and epoch % config.picture_epochs == 0:
                log.picture(self.step, self._picture(self.shown))
            while batch is not None:
                loss = self.forward_backward(batch)
                # A checkpoint holds no batch, so one is made ahead only between these steps.
                at_rest = (self.step + 1) % config.log_steps == 0
                ahead = None if at_rest else self._next(crops, self.step + 1)
                self.update()
                recent.append((loss, batch.rows))
                if log:
                    log.step()
                if at_rest or self.step == self.last_step:
                    mean = self._mean_loss(recent)
                    recent.clear()
                    if log:
                        rate = self.optimizer.param_groups[0]["lr"]
                        scalars = {"loss": mean, "learning_rate": rate}
                        if self.rolling:
                            scalars["attention_coverage"] = self.rolling.bank.coverage
                        log.point(self.step, epoch, scalars)
                if at_rest:
                    due = time.monotonic() - saved_at > config.checkpoint_minutes * 60
                    wishes = here.gather((due, stop.asked))
                    stopping = any(asked for _, asked in wishes)
                    if wishes[0][0] or stopping:
                        self.save(log)
                        saved_at, saved_step = time.monotonic(), self.step
                    if stopping:
                        self._close(log, finished=False)
                        return
                    ahead = self._next(crops, self.step)
                batch = ahead
            if self.rolling:
                self.rolling.exchange()
        if self.step > saved_step:
            self.save(log)
        self._close(log, finished=True)

    def patches(self, crops: CropBatch, step: int) -> PatchBatch:
        """Weigh, sample and gather: from crops to what the model takes."""
        attention, plain = None, self.loader.epoch < self.config.plain_epochs
        if not plain and self.attend is not None:
            with self.clock.stage("attention"):
                attention = self.attend(crops, step)
            plain = attention is None  # the first generation is still to come
        join = PLAIN_MAE if plain else self.config.join
        with self.clock.stage("join"):
            weights = join_weights(crops, self.maps, self.sizes.grid, join, attention)
            progress = (step - self.schedule_start) / self.total_steps
            return split_crops(crops, weights, self.sizes, join, self.generator, progress)

    def forward_backward(self, batch: PatchBatch) -> torch.Tensor:
        """Add up the gradients of a batch; returns the mean loss, still on the device."""
        self.side.join()
        parts = batch.chunk(self.config.accumulate)
        total = torch.zeros((), device=self.here.device)
        now, later = contextlib.nullcontext, self._no_sync
        for number, part in enumerate(parts, start=1):
            # The ranks' gradients are averaged once, with the last part.
            with now() if number == len(parts) else later():
                with self.clock.stage("forward"), self._autocast():
                    visible, masked = normalise(part.visible), normalise(part.masked)
                    loss = self.trained(visible, masked, part.split, part.loss_weights) / len(parts)
                with self.clock.stage("backward"):
                    loss.backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        """One optimiser step with the gradients that are there."""
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

    def save(self, log: Log | None = None) -> None:
        """Write a checkpoint of all ranks' state; every rank calls this."""
        if self.rolling:
            self.rolling.exchange()
        loaders = self.here.gather(self.loader.state())
        generators = self.here.gather(self.generator.get_state())
        if self.here.is_main:
            bank = self.rolling.bank if self.rolling else None
            generation = self.periodic.current if self.periodic else None
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
                loaders=loaders,
                generators=generators,
                bank=bank.state() if bank else None,
                generation=generation.step if generation else None,
                config={**self.config.describe(), **self._identity()},
            )
            path = checkpoint.save(self.config.out, state, self.config.keep_checkpoints)
            if log:
                log.event(self.step, "checkpoint", file=path.name)
        self.here.gather(None)  # a slow disk is waited for here; gradients wait ten minutes at most
        if self.periodic:
            self.periodic.saved(self.step, log)

    def plan(self) -> str:
        """Every number of the run that follows from its options, for a reader to check."""
        config, sizes = self.config, self.sizes
        parameters = {
            "encoder": sum(p.numel() for p in self.model.encoder.parameters()),
            "in all": sum(p.numel() for p in self.model.parameters()),
        }
        cached = f"cached {config.spec.id} to the power {config.join.frequency_exponent:g}"
        how = {
            "off": "no attention",
            "live": "live attention on every crop",
            "rolling": f"rolling attention, 1/{config.rolling.every} of a batch refreshed a step",
            "periodic": f"generation {config.periodic.pin} of whole images"
            if config.periodic.pin
            else f"{config.periodic.kind} of whole images, made anew every "
            f"{config.periodic.every} epochs"
            + (
                f"; start `python jobs/refresh_scores.py --follow {config.out}` beside this run"
                if config.refresh == "follow"
                else ""
            ),
        }[config.attention]
        lines = {
            "run": f"{config.out} on {self.here.device}, {self.here.world_size} rank(s), "
            f"{config.precision}",
            "model": f"{config.method}, {config.model} on {sizes.image_size} px in patches of "
            f"{sizes.patch_size} px, {config.decoder} decoder: "
            + ", ".join(f"{n / 1e6:.1f} M parameters {name}" for name, n in parameters.items()),
            "data": f"{len(self.table)} images in {len(self.table.urls)} shards; "
            f"{self.loader.remainder} skipped each epoch to fill whole batches",
            "weights": f"{cached if self.maps is not None else 'uniform'}; {how}",
            "patches": _counts(sizes, config.join),
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
                f"{config.plain_epochs} epochs of plain MAE, {_counts(sizes, PLAIN_MAE)}"
            )
        return "\n".join(f"{name:14}{text}" for name, text in lines.items())

    def _next(self, crops: Iterator[CropBatch], step: int) -> PatchBatch | None:
        """The epoch's next batch or None, on a GPU made beside what the main stream does."""
        with self.side:
            with self.clock.stage("data_wait", on_host=True):
                found = next(crops, None)
            if found is not None and self.loader.step == 1:
                self.shown = found.first(_SHOWN)
            return None if found is None else self.side.hand_over(self.patches(found, step))

    def _close(self, log: Log | None, *, finished: bool) -> None:
        if self.periodic:
            self.periodic.close(finished=finished)
        if log:
            log.event(self.step, "finished" if finished else "stopped by a signal")
            log.close()

    def _identity(self) -> dict[str, Any]:
        """What a continuation must have in common with the run, besides its options."""
        return {
            "device": self.here.device.type,
            "world_size": self.here.world_size,
            "data": self.table.digest,
        }

    def _restore(self, resumed: Checkpoint, exact: bool) -> None:
        self.step = resumed.step
        self.model.load_state_dict(resumed.model)
        self.optimizer.load_state_dict(resumed.optimizer)
        if self.ema and resumed.ema:
            self.ema.module.load_state_dict(resumed.ema)
        if self.rolling and resumed.bank and resumed.config["data"] == self.table.digest:
            self.rolling.bank.load_state(resumed.bank)
        if exact:
            if self.periodic and resumed.generation is not None:
                self.periodic.restore(resumed.generation)
            self.generator.set_state(resumed.generators[self.here.rank])
            self.schedule_start = resumed.schedule_start
        else:
            # Steps only grow, or a checkpoint would be older than those it follows.
            self.schedule_start = resumed.step - resumed.epoch * self.steps_per_epoch
            if self.periodic:
                self.periodic.restart(resumed.epoch)

    def _picture(self, crops: CropBatch) -> Image.Image:
        self.side.join()
        plain, attention = self.loader.epoch < self.config.plain_epochs, None
        if self.rolling and not plain:
            attention = self.rolling.bank.read(crops, self.sizes.grid)  # as it is: no refresh
        elif self.attend and not plain:
            attention = self.attend(crops, self.step)
            plain = attention is None
        join = PLAIN_MAE if plain else self.config.join
        return figures.picture(self.model, self.maps, crops, join, attention)

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=bf16)

    def _mean_loss(self, recent: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Mean of the losses of the last steps, each with its batch's rows.

        Raises:
            FloatingPointError: one of them is no number; its samples are written to a file.
        """
        losses = torch.stack([loss for loss, _ in recent]).tolist()
        first_step = self.step - len(recent) + 1
        for step, (loss, (_, rows)) in enumerate(zip(losses, recent, strict=True), first_step):
            if not math.isfinite(loss):
                path = self.config.out / f"nan-rank{self.here.rank}-step{step:08d}.txt"
                path.write_text("".join(f"{self.table.key(row)}\n" for row in rows.tolist()))
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}; the samples are in {path}. Lower "
                    "--optimiser.base-learning-rate, or look at those images"
                )
        return sum(losses) / len(losses)


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
    run_program(main, parse(sys.argv[1:], __doc__))
