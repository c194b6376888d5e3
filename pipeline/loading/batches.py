"""The data plane for a training loop of your own: shards and a score cache in, split batches out.

for batch in famt_loader(["shards/train-*.tar"], "scores", patches=PatchConfig(image_size=96)):
    images, split = batch.images, batch.patches.split
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.models import PatchConfig
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.masking import PatchBatch, crop_scores, split_crops
from famt.pipeline.loading.resident import crop_loader
from famt.pipeline.options import CACHED_EXPONENT, JoinConfig, LoaderConfig
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.generation import newest_generation
from famt.pipeline.scoring.memory_bank import MapBank
from famt.pipeline.scoring.model_scores import score_crops
from famt.pipeline.scoring.rolling import RollingScores, half_size
from famt.sampling import patch_weights


@dataclass(frozen=True)
class FamtBatch:
    """Crops, the weights of their patches, and the split into masked, thrown and visible.

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
    refreshed: Path | str | None = None,
    kind: str = "token_frequency",
    frequency_exponent: float | None = None,
    encoder: VisionTransformer | None = None,
    attention: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Iterator[FamtBatch]:
    """Load, crop, weigh, split and gather patches, epoch after epoch.

    Args:
        shards: tars, folders of tars, wildcards or brace patterns.
        cache: folder or URL of the score cache.
        patches: sizes of crops, patches and units.
        loader: how crops are read and cut; its image size is that of `patches`.
        join: how patches are masked, thrown and predicted by their weights.
        spec: which cached score weighs; the default one if left out.
        refreshed: folder of generations, the newest of which replaces the cached score at the
            beginning of each epoch; or one generation's file. A run writes them to its folder
            `refresh`, `famt refresh --out` makes them from a checkpoint or any model's weights.
        kind: which score of the generation.
        frequency_exponent: power of the cached (0.25 if left out) or refreshed (1) score in the
            weight; 0 needs no scores at all.
        encoder: a timm ViT in training. Weights are multiplied by its rolling attention: an eighth
            of each batch is scored at half size.
        attention: crops `[B, S, S, 3]` uint8 -> `[B, N]`, >= 0, to multiply weights by instead.
        epochs: passes over the images.
        rank, world_size: this process among those that share an epoch.
        device: of the batches; "cuda" decodes large images there.
        seed: of order, crops and draws of patches.

    Yields:
        full batches, equally many on every rank.

    Raises:
        CacheError: a shard can't be read or lacks the scores; names it and the remedy.
        GenerationError: no generation of these images at `refreshed`; names it and the remedy.
        FileNotFoundError: a pattern matches nothing, or there is no cache.
        UserError: fewer samples than one batch on every rank.
    """
    join, spec = join or JoinConfig(), spec or ScoreSpec()
    exponent = frequency_exponent
    if exponent is None:
        exponent = 1.0 if refreshed else CACHED_EXPONENT
    cached = exponent != 0 and not refreshed
    score_cache = ScoreCache(cache, create=exponent == 0)
    table = load_samples(shards, score_cache, spec if cached else None)
    maps = load_maps(table, score_cache, spec) if cached else None
    crops_of_epoch = crop_loader(
        table,
        dataclasses.replace(loader or LoaderConfig(), image_size=patches.image_size),
        drop_last=True,
        rank=rank,
        world_size=world_size,
        device=device,
        seed=seed,
    )
    look = None
    if encoder is not None:
        half = half_size(patches.image_size, patches.patch_size)
        score = partial(score_crops, "attention", encoder, size=half)
        look = RollingScores(MapBank(len(table), patches.grid), patches.grid, score)
    generator = torch.Generator(device).manual_seed(seed * world_size + rank)
    total = epochs * crops_of_epoch.steps_per_epoch
    for epoch in range(epochs):
        if refreshed and exponent:
            generation = newest_generation(Path(refreshed))
            maps = generation.maps(table, [kind], patches.grid)[kind]
        for step, crops in enumerate(crops_of_epoch, start=epoch * crops_of_epoch.steps_per_epoch):
            signals = {}
            if maps is not None:
                signals["frequency"] = crop_scores(maps, crops, patches.grid)
            if attention is not None:
                signals["attention"] = attention(crops.images)
            elif look is not None:
                signals["attention"] = look.read(crops, step)
            if signals:
                weights = patch_weights(signals, {"frequency": exponent})
            else:
                weights = torch.ones(len(crops.rows), patches.grid**2, device=crops.images.device)
            yield FamtBatch(
                images=crops.images,
                weights=weights,
                patches=split_crops(crops, weights, patches, join, generator, step / total),
                labels=table.labels[crops.rows],
            )
