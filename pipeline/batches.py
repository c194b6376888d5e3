"""The data plane alone: from shards and a score cache to split batches, for anybody's loop.

for batch in famt_loader(["shards/train-*.tar"], "scores", patches=PatchConfig(image_size=96)):
    images, split = batch.images, batch.patches.split
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from famt.models import PatchConfig
from famt.sampling import patch_weights
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, PatchBatch, crop_scores, split_crops
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.scores import ScoreSpec
from pipeline.table import load_maps, load_samples


@dataclass(frozen=True)
class FamtBatch:
    """Crops, how heavy their patches are, and which of them are masked, thrown and visible.

    Attributes:
        images: `[B, S, S, 3]` uint8, whole crops.
        weights: `[B, N]` float32, >= 0, of their patches in raster order.
        patches: the split and the pixels of its visible and its predicted patches.
        labels: `[B]` int64, -1 where a sample has none.
    """

    images: Tensor
    weights: Tensor
    patches: PatchBatch
    labels: Tensor


def famt_loader(
    shards: list[str],
    cache: str,
    *,
    patches: PatchConfig,
    loader: LoaderConfig | None = None,
    join: JoinConfig | None = None,
    spec: ScoreSpec | None = None,
    frequency_exponent: float = 0.25,
    attention: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[FamtBatch]:
    """Load, crop, weigh, split and gather, epoch after epoch.

    Args:
        shards: tars, folders of tars, wildcards or brace patterns.
        cache: folder or URL of the score cache.
        patches: sizes of crops, patches and units.
        loader: how crops are read and cut; its image size is that of `patches`.
        join: which patches are masked, thrown, seen and predicted, by their weights.
        spec: which score weighs; the default one if left out.
        frequency_exponent: power of the cached score in the weight; 0 needs no scores at all.
        attention: crops `[B, S, S, 3]` uint8 -> `[B, N]`, >= 0, which the weights are multiplied
            by: the attention of a model in training, say.
        epochs: passes over the shards.
        rank, world_size: this process among those that share an epoch.
        device: where batches end up; "cuda" decodes there.
        seed: of shuffle, crops and draws.

    Yields:
        full batches, as many on every rank.

    Raises:
        CacheError: a shard that can't be read, or lacks the scores; names it and the command.
        FileNotFoundError: a pattern that matches nothing, or no cache.
        ValueError: fewer samples than one batch on every rank.
    """
    join, weighs = join or JoinConfig(), frequency_exponent != 0
    score_cache, spec = ScoreCache(cache, create=not weighs), spec or ScoreSpec()
    table = load_samples(shards, score_cache, spec if weighs else None)
    maps = load_maps(table, score_cache, spec) if weighs else None
    crop_loader = CropLoader(
        table,
        dataclasses.replace(loader or LoaderConfig(), image_size=patches.image_size),
        drop_last=True,
        rank=rank,
        world_size=world_size,
        device=device,
        seed=seed,
    )
    generator = torch.Generator(device).manual_seed(seed * world_size + rank)
    total = epochs * crop_loader.steps_per_epoch
    for epoch in range(epochs):
        for step, crops in enumerate(crop_loader, start=epoch * crop_loader.steps_per_epoch):
            signals = {}
            if maps is not None:
                signals["frequency"] = crop_scores(maps, crops, patches.grid)
            if attention is not None:
                signals["attention"] = attention(crops.images)
            if signals:
                weights = patch_weights(signals, {"frequency": frequency_exponent})
            else:
                weights = torch.ones(len(crops.rows), patches.grid**2, device=crops.images.device)
            yield FamtBatch(
                images=crops.images,
                weights=weights,
                patches=split_crops(crops, weights, patches, join, generator, step / total),
                labels=table.labels[crops.rows],
            )
