"""Runs an evaluator, and reports to the terminal, the run's log and TensorBoard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from famt.mae import MaskedAutoencoder
from famt.models import ModelConfig
from famt.train import checkpoint
from famt.train.distributed import join_ranks
from famt.train.evaluate.check_splits import check_pair
from famt.train.evaluate.evaluation import Evaluation
from famt.train.evaluate.features import Value, open_images
from famt.train.initial import build_initial_encoder
from famt.train.log import evaluation_table, log_evaluation, rounded


def run(options: Evaluation) -> dict[str, Value]:
    """Evaluate an encoder; returns what was measured, by name.

    Nothing is returned if fine-tuning was asked to stop; the same command resumes it.

    Raises:
        FileNotFoundError, UserError: see `famt.train.initial.build_initial_encoder`.
        CacheError: see `famt.pipeline.loading.dataset.load_samples`.
    """
    name = options.evaluator()
    torch.manual_seed(options.seed)
    options = dataclasses.replace(options, checkpoint=_latest(options.checkpoint))
    encoder, of_run = open_encoder(options), _run_of(options.checkpoint)
    with join_ranks(options.device) as ranks:
        encoder = encoder.to(ranks.device)
        train, val = (open_images(options, encoder, each, ranks) for each in ("train", "val"))
        check_pair(train, val)
        found = dict(options.measure(encoder, train, val))
    if not found or not ranks.is_main:
        return found
    about: dict[str, Value] = {"evaluate": name, "checkpoint": options.checkpoint}
    about["weights"] = options.weights
    if of_run:
        about["step"] = of_run[1]
    values: dict[str, Value] = {}
    for images in (train, val):
        values |= {f"{images.name}_images": len(images), f"{images.name}_data": images.table.digest}
    values |= found
    line = rounded(about | values)
    print(json.dumps(line) if options.json else evaluation_table(line))
    if of_run:
        log_evaluation(*of_run, name, options.weights, values, options.conditions())
    return found


def open_encoder(options: Evaluation) -> VisionTransformer:
    """The encoder to evaluate, in eval mode."""
    encoder = build_initial_encoder(options.checkpoint, ema=options.ema)
    if options.untrained:
        encoder = MaskedAutoencoder(ModelConfig.of(encoder)).encoder.eval()
    return encoder


def _latest(source: str) -> str:
    """A run's last checkpoint, as the run may go on training; any other source unchanged."""
    path = Path(source)
    return str((checkpoint.latest(path) if path.is_dir() else None) or source)


def _run_of(source: str) -> tuple[Path, int] | None:
    """Run folder and step of one of our checkpoints; None for any other source."""
    path = Path(source)
    is_ours = path.is_file() and checkpoint.is_checkpoint(path)
    return (path.parent, checkpoint.load(path).step) if is_ours else None
