"""Pre-train a vision transformer on shards, by masked image modelling.

    python -m famt.train.pretrain --shards 'shards/train-*.tar' --cache scores/ --out runs/first
    torchrun --nproc-per-node 8 -m famt.train.pretrain --shards ... --cache ... --out ... \\
        --model vit_base --batch-size 512 --epochs 800 --precision bf16

`--recipe` sets the defaults of the other options: a recipe listed below, or the path of your own
file. Options given on the command line override it.

A run resumes from the last checkpoint in `--out`. SIGTERM and SIGUSR1 make it write one and exit.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.models import ModelConfig
from famt.patch_counts import patch_counts
from famt.patches import normalise
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropBatch, own_share
from famt.pipeline.loading.masking import PatchBatch
from famt.pipeline.loading.stage import stage_shards
from famt.pipeline.options import JoinConfig
from famt.pipeline.scoring.model_scores import require_class_token
from famt.pipeline.wording import counted
from famt.train.checkpoint import Component
from famt.train.command_line import parsed, run_program
from famt.train.config import Pretrain
from famt.train.distributed import Ranks, data_parallel, join_ranks
from famt.train.evaluate.monitor import Monitor
from famt.train.initial import load_initial
from famt.train.loop import Training
from famt.train.optimisation import Optimisation
from famt.train.picture import picture_of_crops
from famt.train.run_folder import own_folder
from famt.train.signals.patch_weights import Weighed, weigh_crops
from famt.train.signals.refresh_folder import RefreshFolder
from famt.train.signals.refreshed_maps import RefreshedMaps, lost_generations
from famt.train.signals.signal import Context, Signal, Step
from famt.train.stop import Stop


def main(config: Pretrain) -> bool:
    """Train for `config.epochs`, resuming from the last checkpoint if there is one; False if asked
    to stop before the end."""
    with (
        join_ranks(config.device) as ranks,
        own_folder(config.out) if ranks.is_main else contextlib.nullcontext(),
        Stop() as stop,
    ):
        return Run(config, ranks).train(stop)


class Run(Training[PatchBatch]):
    """A pre-training run: its parts, and its step."""

    name = "pretrain"
    config: Pretrain
    model: MaskedModel

    def __init__(self, config: Pretrain, ranks: Ranks) -> None:
        scored = config.cached_score
        cache = ScoreCache(config.cache, create=scored is None)
        samples = ranks.share(lambda: load_samples(config.shards, cache, scored))
        super().__init__(
            config, samples, ranks, lambda found: lost_generations(found, config, samples)
        )
        self.method, self.sizes = config.method, config.sizes
        self.model = METHODS[config.method](self.sizes).to(ranks.device)
        self.model.checkpoint_blocks = config.checkpoint_blocks
        attention = [] if config.attention.is_off else [config.attention.kind]
        require_class_token([*attention, *config.refreshed_kinds], self.model.encoder)
        self.began_with = (
            load_initial(self.model, config.init) if config.init and not self.resumed else None
        )
        first_epoch = self.resumed.epoch if self.resumed else 0
        self.generator = torch.Generator(ranks.device).manual_seed(
            (config.seed + first_epoch) * ranks.world_size + ranks.rank
        )
        count, size = len(samples), ranks.world_size
        parts = [own_share(count, rank, size) for rank in ranks.of_machine()]
        staged = stage_shards(samples, cache, config.stage, parts, show=ranks.is_main)
        self.samples = staged
        self.loader = self.open_loader(self.sizes.image_size)
        encoder = self.model.encoder
        ended = self.resumed is not None and self.resumed.progress == 1
        refreshed = (
            RefreshedMaps(self.id, config, self.samples, encoder, ranks, ended=ended)
            if config.refreshed_kinds
            else None
        )
        if refreshed is None and ranks.is_main:
            RefreshFolder(config.out).finish()  # a refresh job need not wait
        self.context = Context(
            samples=self.samples,
            sizes=self.sizes,
            encoder=encoder,
            ranks=ranks,
            # Without `self`: a cycle would keep an ended run's memory.
            cached=partial(load_maps, staged, cache, config.spec),
            score=config.spec.id,
            seed=config.seed,
            parts=config.accumulate,
            bf16=config.precision == "bf16",
            refreshed=refreshed,
        )
        self.signals: list[Signal] = [
            slot.build(self.context) for slot in config.slots.values() if not slot.is_off
        ]
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
        self.pictured = _Pictured(ranks.device)
        self.monitor = Monitor(config, cache, ranks) if config.monitor and ranks.is_main else None
        self.restore()
        self.parallel_model, self._no_sync = data_parallel(
            self.model, ranks, compile=config.compile
        )
        self.model.train()

    def begin_epoch(self, epoch: int, stop: Stop) -> bool:
        return all(each.begin_epoch(epoch, self.step, stop, self.log) for each in self.signals)

    def prepare(self, crops: CropBatch, step: int) -> PatchBatch:
        """Weigh, sample and gather: from crops to the model's input."""
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
            # Gradients are averaged over ranks once, with the last part.
            with now() if number == len(parts) else no_sync():
                with self.clock.stage("forward"), self.autocast():
                    visible, masked = normalise(part.visible), normalise(part.masked)
                    loss, of_patches = self.parallel_model(
                        visible, masked, part.split, part.loss_weights
                    )
                    loss = loss / len(parts)
                with self.clock.stage("backward"):
                    loss.backward()
            total += loss.detach()
            errors.append(of_patches)
        if self.signals:
            with self.clock.stage("signals"):
                step = Step(batch.views, batch.split, torch.cat(errors), self.step)
                for signal in self.signals:
                    signal.learn(step)
        return total

    def scalars(self) -> dict[str, float]:
        scalars = super().scalars()
        for signal in self.signals:
            scalars |= signal.scalars()
        return scalars

    def end_epoch(self, epoch: int, stop: Stop) -> bool:
        for signal in self.signals:
            signal.synchronise()
        is_due = (epoch + 1) % self.config.monitor_epochs == 0 or self.step == self.last_step
        if not (self.config.monitor and is_due):
            return True
        self.side_stream.join()
        done = True
        if self.monitor and self.log:
            with self.clock.stage("monitor", on_host=True):
                done = self.monitor.look(self.model.encoder, self.step, self.log, stop)
        return all(self.ranks.gather(done))  # collectives of gradients time out sooner

    def components(self) -> dict[str, Component]:
        return super().components() | {each.name: each for each in self.signals}

    def own_components(self) -> dict[str, Component]:
        own = super().own_components()
        return own | {"generator": _Generator(self.generator), "pictured": self.pictured}

    def save(self) -> None:
        for signal in self.signals:
            signal.synchronise()
        super().save()
        for signal in self.signals:
            signal.saved(self.step, self.log)

    def close(self, *, finished: bool) -> None:
        for signal in self.signals:
            signal.close(finished=finished)

    def picture(self, crops: CropBatch | None, epoch: int) -> Image.Image | None:
        """The run's first crops with signals, weights, split and reconstruction, as in training."""
        every = self.config.picture_epochs
        shown = self.pictured.crops = self.pictured.crops or crops
        if not every or shown is None or (crops and epoch % every):
            return None
        self.side_stream.join()
        return picture_of_crops(self.model, self._weigh(shown, self.step, look=True))

    def derived(self) -> dict[str, str]:
        config, sizes = self.config, self.sizes
        parameters = {
            "encoder": sum(p.numel() for p in self.model.encoder.parameters()),
            "in all": sum(p.numel() for p in self.model.parameters()),
        }
        decoder = config.decoder if METHODS[self.method].has_decoder else "no"
        lines = {
            "model": f"{config.method}, {config.model} on {sizes.image_size} px in patches of "
            f"{sizes.patch_size} px, {decoder} decoder: "
            + ", ".join(f"{n / 1e6:.1f} M parameters {name}" for name, n in parameters.items()),
            "data": f"{counted(len(self.samples), 'image')} in "
            f"{counted(len(self.samples.urls), 'shard')}; "
            f"{self.loader.remainder} skipped each epoch to fill whole batches"
            + (f"; {config.crops_per_image} crops of each" if config.crops_per_image > 1 else ""),
            **{each.name: each.describe() for each in self.signals},
            "patches": _counts(sizes, config.join)
            + ("" if self.signals else ", all of the same weight"),
            **({"no effect": ", ".join(unused)} if (unused := config.without_effect()) else {}),
            "batch": f"{self.optimisation.effective_batch} = {config.batch_size} x "
            f"{counted(self.ranks.world_size, 'rank')}, in {counted(config.accumulate, 'part')}",
            **self.optimisation.describe(),
        }
        if self.began_with:
            lines["starts from"] = f"{config.init}\n{self.began_with.describe()}"
        if config.optimiser.ema_decay:
            lines["average"] = f"of the encoder's weights, decay {config.optimiser.ema_decay:g}"
        if config.plain_until:
            lines["at first"] = (
                f"{counted(config.plain_until, 'epoch')} of plain masking, "
                f"{_counts(sizes, config.plain)}"
            )
        return lines

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


@dataclass(frozen=True)
class _Generator:
    """A torch generator as a component."""

    generator: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["state"])


@dataclass
class _Pictured:
    """The crops that all pictures of a run show, as a component; other ranks have none."""

    device: torch.device
    crops: CropBatch | None = None

    def state_dict(self) -> dict[str, Any]:
        # On the CPU: another rank would unpickle them on this one's GPU.
        return {name: part.cpu() for name, part in vars(self.crops).items()} if self.crops else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            whole = CropBatch(**{name: part.clone() for name, part in state.items()})
            self.crops = replace(whole, images=whole.images.to(self.device))


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
    run_program(main, parsed(Pretrain, __doc__))
