"""How good are the features? A linear classifier on a frozen encoder.

    python -m train.linear_probe --checkpoint runs/first --cache scores/ \\
        --train 'shards/train-*.tar' --val 'shards/val-*.tar'

Every image goes through the encoder once, its centre crop alone; the classifier is trained on the
stored features. Prints one JSON line with the top-1 accuracy on both sets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.cache import ScoreCache
from pipeline.loader import LoaderConfig
from train.checkpoint import load_model
from train.distributed import ranks
from train.features import Pool, labelled_features
from train.program import run_program


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe of a pre-trained encoder."""

    checkpoint: Path
    """checkpoint file, or folder of a run"""
    cache: str
    """score cache that knows the shards"""
    train: list[str]
    """shards to train the classifier on"""
    val: list[str]
    """shards to test it on"""
    ema: bool = False
    """take the averaged weights of the encoder, of a run with --optimiser.ema-decay"""
    untrained: bool = False
    """probe the same encoder with fresh random weights instead: the floor to beat"""
    pool: Pool = "cls"
    """features are the class token, as in MAE's own probe, or the mean of the patch tokens"""
    centre: float | None = None
    """share of the shorter side that is shown; 0.875, or all of it up to 64 px"""
    epochs: int = 100
    """passes over the stored features"""
    batch_size: int = 256
    """images a step, in extraction and in training"""
    learning_rate: float = 1e-2
    """of AdamW, with cosine decay"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """what to compute on"""
    threads: int = LoaderConfig.threads
    """CPU threads that decode"""
    seed: int = 0
    """of the classifier, and of the untrained encoder"""


def main(config: LinearProbe) -> float:
    """Run the probe; returns top-1 accuracy on `val`, in [0, 1]."""
    torch.manual_seed(config.seed)
    model = load_model(config.checkpoint, ema=config.ema)
    if config.untrained:
        model = type(model)(model.config)
    centre = config.centre or (0.875 if model.config.image_size > 64 else 1.0)
    cache = ScoreCache(config.cache)
    with ranks(config.device) as here:
        sets = {
            name: labelled_features(
                model.encoder,
                shards,
                cache,
                centre=centre,
                batch_size=config.batch_size,
                pool=config.pool,
                threads=config.threads,
                device=here.device,
                name=f"{name} features",
            )
            for name, shards in (("train", config.train), ("val", config.val))
        }
        classes = int(max(labels.max() for _, labels in sets.values())) + 1
        classifier = fit(*sets["train"], classes, config, here.device)
        accuracy = {name: _accuracy(classifier, *each) for name, each in sets.items()}
    print(
        json.dumps(
            {
                "probe": str(config.checkpoint),
                "untrained": config.untrained,
                "top1": accuracy["val"],
                "train_top1": accuracy["train"],
                "images": {name: len(labels) for name, (_, labels) in sets.items()},
                "classes": classes,
            }
        )
    )
    return accuracy["val"]


def fit(
    features: Tensor, labels: Tensor, classes: int, config: LinearProbe, device: torch.device
) -> nn.Module:
    """Train a linear classifier on features `[R, C]` and labels `[R]`.

    Features are standardised first, without learned scale: MAE (appendix A.1) found that a linear
    probe of its features needs that.
    """
    classifier = nn.Sequential(
        nn.BatchNorm1d(features.shape[1], affine=False), nn.Linear(features.shape[1], classes)
    ).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    steps = -(-len(features) // config.batch_size) * config.epochs
    optimizer = torch.optim.AdamW(classifier.parameters(), config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, desc="classifier", unit="step", mininterval=1) as bar:
        for _ in range(config.epochs):
            for batch in torch.randperm(len(features), generator=generator).split(
                config.batch_size
            ):
                if len(batch) == 1:
                    continue  # a single sample has no deviation to standardise by
                logits = classifier(features[batch].to(device))
                loss = F.cross_entropy(logits, labels[batch].to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.update()
    return classifier.eval()


@torch.inference_mode()
def _accuracy(classifier: nn.Module, features: Tensor, labels: Tensor) -> float:
    device = next(classifier.parameters()).device
    correct = [
        (classifier(part.to(device)).argmax(1).cpu() == truth).sum()
        for part, truth in zip(features.split(4096), labels.split(4096), strict=True)
    ]
    return float(torch.stack(correct).sum()) / len(labels)


if __name__ == "__main__":
    run_program(main, tyro.cli(LinearProbe, description=__doc__))
