"""Pre-train a vision transformer on shards, by masked image modelling.

    python -m famt.train.pretrain --shards 'shards/train-*.tar' --cache scores/ --out runs/first
    torchrun --nproc-per-node 8 -m famt.train.pretrain --shards ... --cache ... --out ... \\
        --model vit_base --batch-size 512 --epochs 800 --precision bf16

`--recipe` sets the defaults of other options, which still override it: the name of one of those
below, or the path of a file of your own.

A run goes on from the last checkpoint in `--out`. SIGTERM and SIGUSR1 make it write one and leave.
"""

from __future__ import annotations

import contextlib
import sys
import uuid
from typing import Any

import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.models import ModelConfig
from famt.patches import normalise
from famt.pipeline.cache import ScoreCache
from famt.pipeline.join import JoinConfig, PatchBatch
from famt.pipeline.loader import CropBatch, CropLoader, LoaderConfig, own_share
from famt.pipeline.resident import ResidentLoader
from famt.pipeline.stage import stage_shards
from famt.pipeline.table import load_samples
from famt.sampling import patch_counts
from famt.train import figures
from famt.train.checkpoint import Checkpoint
from famt.train.config import Pretrain, parse
from famt.train.distributed import Ranks, data_parallel, join_ranks
from famt.train.evaluate.monitor import Monitor
from famt.train.initial import load_initial
from famt.train.loop import Training
from famt.train.optimisation import Optimisation
from famt.train.program import run_program
from famt.train.resume import own_folder, resume
from famt.train.signals.refresh_folder import RefreshFolder
from famt.train.signals.refreshed import RefreshedMaps, lost_generations
from famt.train.signals.signal import Context, Signal, Taken
from famt.train.signals.weights import Weighed, build_signals, weigh_crops
from famt.train.streams import Stop


def main(config: Pretrain) -> None:
    """Train until `config.epochs` are done, going on from the last checkpoint if there is one."""
    with (
        join_ranks(config.device) as ranks,
        own_folder(config.out) if ranks.is_main else contextlib.nullcontext(),
        Stop(ranks.lifeline) as stop,
    ):
        Run(config, ranks).train(stop)


class Run(Training[PatchBatch]):
    """A pre-training run: everything it holds, and what a step of it is."""

    name = "pretrain"
    config: Pretrain
    model: MaskedModel

    def __init__(self, config: Pretrain, ranks: Ranks) -> None:
        scored = config.cached_score
        cache = ScoreCache(config.cache, create=scored is None)
        super().__init__(
            config, ranks.share(lambda: load_samples(config.shards, cache, scored)), ranks
        )
        resumed, exact = resume(
            config,
            self.identity(),
            ranks,
            lambda found: lost_generations(found, config, self.samples),
        )
        self.id: str = resumed.run if resumed else ranks.gather(f"run-{uuid.uuid4().hex[:12]}")[0]

        torch.manual_seed(config.seed)
        self.method, self.sizes = config.method, config.sizes
        self.model = METHODS[config.method](self.sizes).to(ranks.device)
        self.began_with = (
            load_initial(self.model, config.init) if config.init and not resumed else None
        )
        first_epoch = resumed.epoch if resumed else 0
        own = resumed.ranks[ranks.rank] if resumed and exact else None
        self.generator = torch.Generator(ranks.device).manual_seed(
            (config.seed + first_epoch) * ranks.world_size + ranks.rank
        )
        count, size = len(self.samples), ranks.world_size
        parts = [own_share(count, rank, size) for rank in ranks.of_machine()]
        self.samples = stage_shards(self.samples, cache, config.stage, parts, show=ranks.is_main)
        self.loader = (ResidentLoader if config.resident else CropLoader)(
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
                resident=config.resident,
            ),
            drop_last=True,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            seed=config.seed,
            first_epoch=first_epoch,
            state=own["loader"] if own else None,
        )
        encoder = self.model.encoder
        refreshed = (
            RefreshedMaps(self.id, config, self.samples, encoder, ranks)
            if config.refreshed_kinds
            else None
        )
        if refreshed is None and ranks.is_main:
            RefreshFolder(config.out).finish()  # a job that follows this run need not wait
        self.context = Context(
            self.id, config, self.samples, cache, self.sizes.grid, encoder, ranks, refreshed
        )
        self.signals: list[Signal] = build_signals(self.context)
        self.optimisation = Optimisation(
            config.optimiser,
            self.model,
            param_groups_weight_decay(self.model, config.optimiser.weight_decay),
            encoder,
            betas=(0.9, 0.95),
            epochs=config.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            effective_batch=config.batch_size * ranks.world_size,
        )
        self.monitor = (
            Monitor(config.monitor, cache, self.sizes, config.threads, ranks, config.stage)
            if config.monitor and ranks.is_main
            else None
        )
        if resumed:
            self._restore(resumed, exact)
        self.trained, self._no_sync = data_parallel(self.model, ranks, compile=config.compile)
        self.model.train()

    def begin_epoch(self, epoch: int, stop: Stop) -> bool:
        return all(each.begin_epoch(epoch, self.step, stop, self.log) for each in self.signals)

    def prepare(self, crops: CropBatch, step: int) -> PatchBatch:
        """Weigh, sample and gather: from crops to what the model takes."""
        with self.clock.stage("signals"):
            weighed = self._weigh(crops, step)
        with self.clock.stage("join"):
            return self.side_stream.hand_over(weighed.split(self.sizes, self.generator))

    def forward_backward(self, batch: PatchBatch) -> Tensor:
        self.side_stream.join()
        parts = batch.chunk(self.config.accumulate)
        total = torch.zeros((), device=self.ranks.device)
        errors = []
        now, no_sync = contextlib.nullcontext, self._no_sync
        for number, part in enumerate(parts, start=1):
            # The ranks' gradients are averaged once, with the last part.
            with now() if number == len(parts) else no_sync():
                with self.clock.stage("forward"), self.autocast():
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

    def scalars(self) -> dict[str, float]:
        scalars = {"learning_rate": self.optimisation.present_learning_rate}
        for signal in self.signals:
            scalars |= signal.scalars()
        return scalars

    def end_epoch(self, epoch: int, stop: Stop) -> bool:
        for signal in self.signals:
            signal.synchronise()
        if not self.config.monitor or not self._monitor_is_due(epoch):
            return True
        self.side_stream.join()
        done = True
        if self.monitor and self.log:
            with self.clock.stage("monitor", on_host=True):
                done = self.monitor.look(self.model.encoder, self.step, self.log, stop)
        return all(self.ranks.gather(done))  # gradients would wait ten minutes at most

    def state_of_rank(self) -> dict[str, Any]:
        return {**super().state_of_rank(), "generator": self.generator.get_state()}

    def state_of_signals(self) -> dict[str, dict[str, Any]]:
        return {each.name: each.state() for each in self.signals}

    def save(self) -> None:
        for signal in self.signals:
            signal.synchronise()
        super().save()
        for signal in self.signals:
            signal.saved(self.step, self.log)

    def close(self, *, finished: bool) -> None:
        for signal in self.signals:
            signal.close(finished=finished)

    def picture(self, crops: CropBatch, epoch: int) -> Image.Image | None:
        """Crops with their signals, weights, split and reconstruction, as the run makes them."""
        every = self.config.picture_epochs
        if not every or epoch % every:
            return None
        self.side_stream.join()
        return figures.picture(self.model, self._weigh(crops, self.step, look=True))

    def plan(self) -> str:
        config, sizes = self.config, self.sizes
        parameters = {
            "encoder": sum(p.numel() for p in self.model.encoder.parameters()),
            "in all": sum(p.numel() for p in self.model.parameters()),
        }
        lines = {
            "run": f"{config.out} on {self.ranks.device}, {self.ranks.world_size} rank(s), "
            f"{config.precision}",
            "model": f"{config.method}, {config.model} on {sizes.image_size} px in patches of "
            f"{sizes.patch_size} px, {config.decoder if self.model.has_decoder else 'no'} decoder: "
            + ", ".join(f"{n / 1e6:.1f} M parameters {name}" for name, n in parameters.items()),
            "data": f"{len(self.samples)} images in {len(self.samples.urls)} shards; "
            f"{self.loader.remainder} skipped each epoch to fill whole batches"
            + (f"; {config.crops_per_image} crops of each" if config.crops_per_image > 1 else ""),
            **{each.name: each.describe() for each in self.signals},
            "patches": _counts(sizes, config.join)
            + ("" if self.signals else ", all of the same weight"),
            **({"no effect": ", ".join(unused)} if (unused := config.without_effect()) else {}),
            "batch": f"{self.optimisation.effective_batch} = {config.batch_size} x "
            f"{self.ranks.world_size} rank(s), in {config.accumulate} part(s)",
            **self.optimisation.describe(),
        }
        if self.began_with:
            lines["begins with"] = f"{config.init}\n{self.began_with.describe()}"
        if config.optimiser.ema_decay:
            lines["average"] = f"of the encoder, decay {config.optimiser.ema_decay:g}"
        if config.plain_until:
            lines["before"] = (
                f"{config.plain_until} epochs of plain masking, {_counts(sizes, config.plain)}"
            )
        return "\n".join(f"{name:14}{text}" for name, text in lines.items())

    def _weigh(self, crops: CropBatch, step: int, *, look: bool = False) -> Weighed:
        return weigh_crops(
            self.config,
            self.signals,
            crops,
            epoch=self.loader.epoch,
            step=step,
            progress=self.optimisation.progress(step),
            look=look,
        )

    def _monitor_is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.monitor_epochs == 0 or self.step == self.last_step

    def _restore(self, resumed: Checkpoint, exact: bool) -> None:
        self.model.load_state_dict(resumed.model)
        self.optimisation.load_state(vars(resumed), exact=exact)
        if exact:
            self.generator.set_state(resumed.ranks[self.ranks.rank]["generator"])
        same_rows = resumed.config["data"] == self.samples.digest
        for signal in self.signals:
            if signal.name in resumed.signals:
                state = resumed.signals[signal.name]
                signal.load_state(state, epoch=resumed.epoch, exact=exact, same_rows=same_rows)


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
