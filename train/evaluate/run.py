"""Runs an evaluator, and reports to the terminal, the run's log and TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import zip_longest
from pathlib import Path
from pkgutil import resolve_name

import torch
from timm.models.vision_transformer import VisionTransformer

from famt.mae import MaskedAutoencoder
from famt.models import ModelConfig
from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.sharding.dataset_json import NAME, described
from famt.pipeline.wording import counted
from famt.train import checkpoint
from famt.train.distributed import allow_tf32, join_ranks
from famt.train.evaluate.evaluation import Evaluation
from famt.train.evaluate.features import Images, Value, open_images
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
    measure = resolve_name(f"famt.train.evaluate.{options.measured_by}")
    torch.manual_seed(options.seed)
    source = Path(options.checkpoint)
    if source.is_dir() and (last := checkpoint.latest(source)):  # the run may go on training
        source, options = last, dataclasses.replace(options, checkpoint=str(last))
    of_run = source.is_file() and checkpoint.is_checkpoint(source)
    encoder = open_encoder(options)
    allow_tf32()
    with join_ranks(options.device) as ranks:
        encoder = encoder.to(ranks.device)
        train, val = (open_images(options, encoder, each, ranks) for each in ("train", "val"))
        check_pair(train, val)
        found = dict(measure(encoder, train, val, options))
    if not found or not ranks.is_main:
        return found
    about: dict[str, Value] = {"evaluate": name, "checkpoint": options.checkpoint}
    about["weights"] = options.weights
    if of_run:
        about["step"] = checkpoint.step_of(source)
    values: dict[str, Value] = {}
    for images in (train, val):
        values |= {f"{images.name}_images": len(images), f"{images.name}_data": images.table.digest}
    values |= found
    line = rounded(about | values)
    classes = len(val.table.labels.unique())
    print(json.dumps(line) if options.json else evaluation_table(line, classes))
    if of_run:
        step, conditions = checkpoint.step_of(source), options.conditions()
        log_evaluation(source.parent, step, name, options.weights, values, conditions)
    return found


def open_encoder(options: Evaluation) -> VisionTransformer:
    """The encoder to evaluate, in eval mode."""
    encoder = build_initial_encoder(options.checkpoint, ema=options.ema)
    if options.untrained:
        encoder = MaskedAutoencoder(ModelConfig.of(encoder)).encoder.eval()
    return encoder


def check_pair(train: Images, val: Images) -> None:
    """Refuse sets whose results would mean nothing, and warn of images that are left out.

    Raises:
        UserError: the sets share images, or a class has different names in them.
    """
    learned = dict(zip(train.table.shard_ids, train.table.urls, strict=True))
    for shard_id, url in zip(val.table.shard_ids, val.table.urls, strict=True):
        if shard_id in learned:
            raise UserError(
                f"{learned[shard_id]} of --train and {url} of --val hold the same images; test on "
                "images that nothing was learned from"
            )
    _compare_names(train, val)
    for images in (train, val):
        left_out = images.table.left_out() if images.ranks.is_main else []
        if left_out:
            print(
                f"warning: {counted(len(left_out), 'image')} of --{images.name} left out, "
                f"{left_out[0]} the first",
                file=sys.stderr,
            )


def _compare_names(train: Images, val: Images) -> None:
    """Refuse class numbers that stand for different names in different folders of shards."""
    folders = dict.fromkeys(storage.split_url(url)[0] for url in train.table.urls + val.table.urls)
    known = {each: about["classes"] for each in folders if (about := described(each))}
    first = next(iter(known), "")
    for folder, classes in known.items():
        for number, names in enumerate(zip_longest(known[first], classes)):
            if len({*names} - {None}) > 1:
                raise UserError(
                    f"class {number} is {names[0]!r} in {first}/{NAME} and {names[1]!r} in "
                    f"{folder}/{NAME}; make both sets of shards again, with the same classes"
                )
