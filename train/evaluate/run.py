"""One evaluation: from a checkpoint to numbers on the terminal, in the log and in TensorBoard."""

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
from famt.train.evaluate.features import Evaluator, Value, open_images
from famt.train.evaluate.finetune import finetune
from famt.train.evaluate.knn import knn
from famt.train.evaluate.options import Evaluation, Finetune, Knn, Probe, Segment
from famt.train.evaluate.probe import probe
from famt.train.evaluate.segment import segment
from famt.train.initial import build_initial_encoder
from famt.train.log import evaluation_table, log_evaluation, rounded

EVALUATORS: dict[str, tuple[type[Evaluation], Evaluator]] = {
    "knn": (Knn, knn),
    "probe": (Probe, probe),
    "finetune": (Finetune, finetune),
    "segment": (Segment, segment),
}


def run(options: Evaluation) -> dict[str, Value]:
    """Evaluate an encoder by the evaluator whose options these are; returns its values by name.

    No value at all: it was asked to stop, and the same command goes on with it.

    Raises:
        FileNotFoundError, ValueError: see `famt.train.initial.build_initial_encoder`.
        CacheError: see `famt.pipeline.dataset.load_samples`.
    """
    name, evaluator = next(
        (name, evaluator) for name, (kind, evaluator) in EVALUATORS.items() if kind is type(options)
    )
    torch.manual_seed(options.seed)
    options = dataclasses.replace(options, checkpoint=_latest(options.checkpoint))
    encoder, of_run = open_encoder(options), _run_of(options.checkpoint)
    with join_ranks(options.device) as ranks:
        encoder = encoder.to(ranks.device)
        train, val = (open_images(options, encoder, each, ranks) for each in ("train", "val"))
        check_pair(train, val)
        found = dict(evaluator(encoder, train, val, options))
    if not found or not ranks.is_main:
        return found
    values: dict[str, Value] = {}
    for images in (train, val):
        values |= {f"{images.name}_images": len(images), f"{images.name}_data": images.table.digest}
    values |= found
    step = {"step": of_run[1]} if of_run else {}
    which = {"checkpoint": options.checkpoint, "weights": options.weights, **step}
    line = rounded({"evaluate": name, **which, **values})
    print(json.dumps(line) if options.json else evaluation_table(line))
    if of_run:
        log_evaluation(*of_run, name, options.weights, values, options.told())
    return found


def open_encoder(options: Evaluation) -> VisionTransformer:
    """The encoder that the options ask for, in eval mode."""
    encoder = build_initial_encoder(options.checkpoint, ema=options.ema)
    if options.untrained:
        encoder = MaskedAutoencoder(ModelConfig.of(encoder)).encoder.eval()
    return encoder


def _latest(source: str) -> str:
    """The latest checkpoint of a run, which may train on meanwhile; any other source as it is."""
    path = Path(source)
    return str((checkpoint.latest(path) if path.is_dir() else None) or source)


def _run_of(source: str) -> tuple[Path, int] | None:
    """Folder of the run that a checkpoint is from, and its step, if it is from one of ours."""
    path = Path(source)
    if not path.is_file() or not path.name.startswith("checkpoint-"):
        return None
    return path.parent, checkpoint.load(path).step
