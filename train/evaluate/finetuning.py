"""Fine-tuning: encoder and classifier trained together.

It is a run of its own in `--out`, with checkpoints, resumes, signals and log as in pre-training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from famt.models import ModelConfig
from famt.patches import normalise_images
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.wording import counted
from famt.train.checkpoint import CLASSIFIER
from famt.train.distributed import data_parallel
from famt.train.evaluate.augmentation import Mixed, Mixer
from famt.train.evaluate.discriminant import discriminants
from famt.train.evaluate.evaluators.finetune import Finetune, Mixing
from famt.train.evaluate.features import (
    Images,
    Results,
    class_count,
    require_labels,
    standard_error,
)
from famt.train.log import log_evaluation
from famt.train.loop import Training
from famt.train.optimisation import Optimisation
from famt.train.run_folder import own_folder
from famt.train.stop import Stop


def finetune(encoder: VisionTransformer, train: Images, val: Images, options: Finetune) -> Results:
    """Top-1 accuracy after the last epoch, also of the averaged weights if they are kept.

    Yields nothing if the run was asked to stop; the same command resumes it.
    """
    require_labels(train, val)
    ranks = train.ranks
    with (
        own_folder(options.out) if ranks.is_main else contextlib.nullcontext(),
        Stop() as stop,
    ):
        run = Finetuning(encoder, train, val, options)
        run.train(stop)
        if run.step < run.last_step:
            return
        found = run.test(stop)
        if found is None:
            if ranks.is_main:
                message = "stopped before the last test was done; the same command repeats it"
                print(message, file=sys.stderr)
            return
    if ranks.is_main:
        log_evaluation(options.out, run.step, "val", "trained", {**found}, options.conditions())
        exported = f"famt export {options.out} --to timm --out {options.out / 'exported'}"
        print(f"encoder and classifier: {options.out}; `{exported}`", file=sys.stderr)
    for name, share in found.items():
        yield name, share
        yield name.replace("top1", "stderr"), standard_error(share, len(val))
    yield "epochs", options.epochs


class Finetuning(Training[Mixed]):
    """A fine-tuning run: its parts, and its step.

    Apart from the loader's, all random draws of a step are seeded by seed, step and rank. So a
    checkpoint needs no state of the generators of Python, NumPy and torch.
    """

    name = "finetune"
    method = CLASSIFIER
    config: Finetune
    model: VisionTransformer

    def __init__(
        self, encoder: VisionTransformer, train: Images, val: Images, options: Finetune
    ) -> None:
        ranks = train.ranks
        super().__init__(options, train.table, ranks)
        self.val = val
        self.classes = class_count(train.table.labels, val.table.labels)
        self.model = classifier(encoder, self.classes, options).to(ranks.device)
        self.sizes = ModelConfig.of(self.model)
        self.loader = self.open_loader(train.image_size)
        self.mixer = Mixer(options.mixing.resolved(options.epochs), self.classes)
        effective_batch = options.batch_size * ranks.world_size
        optimiser = options.optimiser.resolved(options.epochs, effective_batch)
        self.optimisation = Optimisation(
            optimiser,
            self.model,
            param_groups_layer_decay(
                self.model,
                optimiser.weight_decay,
                no_weight_decay_list=("pos_embed", "cls_token"),
                layer_decay=optimiser.layer_decay,
            ),
            self.model,
            betas=(0.9, 0.999),
            epochs=options.epochs,
            steps_per_epoch=self.loader.steps_per_epoch,
            effective_batch=effective_batch,
        )
        if options.head == "discriminant" and not self.resumed:
            self._begin_head(train)
        self.restore()
        self.parallel_model, _ = data_parallel(self.model, ranks, compile=options.compile)
        self.model.train()

    def _begin_head(self, train: Images) -> None:
        """Set the head to the linear discriminants of the model's features of all images."""

        def features() -> Iterator[tuple[Tensor, Tensor]]:
            for crops in train.crops(own_share=True):
                tokens = self.model.forward_features(normalise_images(crops.images))
                pooled = self.model.forward_head(tokens, pre_logits=True)
                yield pooled, train.table.labels[crops.rows]

        self.model.eval()
        weights, biases = discriminants(features(), self.classes, self.ranks)
        with torch.no_grad():
            self.model.head.weight.copy_(weights)
            self.model.head.bias.copy_(biases)

    def prepare(self, crops: CropBatch, step: int) -> Mixed:
        """Augment and mix crops into the model's input."""
        with self.clock.stage("augment"):
            labels = self.samples.labels[crops.rows]
            draws = (self.config.seed, step, self.ranks.rank)
            return self.side_stream.hand_over(self.mixer.mix(crops.images, labels, draws))

    def forward_backward(self, batch: Mixed) -> Tensor:
        self.side_stream.join()
        seed = np.random.SeedSequence([self.config.seed, self.step, self.ranks.rank, 1])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        with self.clock.stage("forward"), self.autocast():
            loss = F.cross_entropy(self.parallel_model(batch.images).float(), batch.targets)
        with self.clock.stage("backward"):
            loss.backward()
        return loss.detach()

    def end_epoch(self, epoch: int, stop: Stop) -> bool:
        if (epoch + 1) % self.config.val_epochs == 0 and self.step < self.last_step:
            values = self.test(stop)
            if values is None:
                return False
            if self.log:
                self.log.found(self.step, "val", values)
        return True

    def test(self, stop: Stop) -> dict[str, float] | None:
        """Top-1 accuracy on --val, each rank testing its share; None if asked to stop meanwhile."""
        models: dict[str, nn.Module] = {"top1": self.model}
        if self.optimisation.ema:
            models["top1_ema"] = self.optimisation.ema
        right, count, left = dict.fromkeys(models, 0.0), 0, False
        for model in models.values():
            model.eval()
        with torch.inference_mode(), self.autocast():
            for crops in self.val.crops(own_share=True):
                if stop.asked:
                    left = True
                    break
                images, labels = normalise_images(crops.images), self.val.table.labels[crops.rows]
                count += len(labels)
                for name, model in models.items():
                    right[name] += float((model(images).argmax(1).cpu() == labels).sum())
        self.model.train()
        everywhere = self.ranks.gather((right, count, left))
        if any(left for *_, left in everywhere):
            return None
        tested = sum(count for _, count, _ in everywhere)
        return {name: sum(each[name] for each, *_ in everywhere) / tested for name in models}

    def derived(self) -> dict[str, str]:
        options, epochs = self.config, self.config.epochs
        count = sum(each.numel() for each in self.model.parameters())
        return {
            "model": f"{options.checkpoint}, {'untrained, ' if options.untrained else ''}"
            f"{count / 1e6:.1f} M parameters, {counted(self.classes, 'class')}",
            "data": f"{counted(len(self.samples), 'image')} in "
            f"{counted(len(self.samples.urls), 'shard')}; "
            f"{self.loader.remainder} skipped each epoch to fill whole batches; {len(self.val)} "
            "to test on",
            "batch": f"{self.optimisation.effective_batch} = {options.batch_size} x "
            f"{counted(self.ranks.world_size, 'rank')}",
            **self.optimisation.describe(),
            "crops": "{:.0%} to {:.0%} of the image".format(*options.view.resolved(epochs).area),
            "mixing": _spelled(options.mixing.resolved(epochs)),
            "layers": f"learning rate x {options.optimiser.layer_decay:g} from block to block",
        }


def _spelled(mixing: Mixing) -> str:
    return (
        f"RandAugment {mixing.randaugment or 'off'}, mixup {mixing.mixup:g}, CutMix "
        f"{mixing.cutmix:g}, label smoothing {mixing.label_smoothing:g}, drop path "
        f"{mixing.drop_path:g}"
    )


def classifier(encoder: VisionTransformer, classes: int, options: Finetune) -> VisionTransformer:
    """The encoder with a linear classifier, whose weights start near zero.

    As in MAE's fine-tuning, mean pooling has a norm of its own instead of the encoder's last one,
    and positions are trained.
    """
    mean = options.pooling == "mean" or not encoder.has_class_token
    model = ModelConfig.of(encoder).build(
        num_classes=classes,
        global_pool="avg" if mean else "token",
        fc_norm=mean,
        drop_path_rate=options.mixing.resolved(options.epochs).drop_path,
    )
    weights = {
        name: value
        for name, value in encoder.state_dict().items()
        if not mean or not name.startswith("norm.")
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith(("head.", "fc_norm.")) for name in missing)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    return model
