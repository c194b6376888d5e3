"""Score whole images with an encoder: the pure kernel under the refresh job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from famt.patches import normalise_images
from famt.pipeline.cache import ScoreCache
from famt.pipeline.loader import CropLoader
from famt.pipeline.model_scores import model_maps
from famt.pipeline.options import LoaderConfig, WholeView
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.table import load_samples, require_shards


def refresh_shards(
    encoder: VisionTransformer,
    urls: list[str],
    cache: ScoreCache,
    specs: Sequence[ModelScoreSpec],
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Iterator[str]:
    """Make the cache hold the maps that an encoder gives of some shards; compute what it lacks.

    Images are squashed to the encoder's size whole, as the paper does.

    Args:
        encoder: on `device`, in eval mode.
        urls: tars that the cache knows.
        specs: what to compute, alike but for their kinds, by one forward pass; their `encoder` is
            the digest of this encoder's weights.
        batch_size: images at a time.
        threads: that decode.

    Yields:
        each shard's URL, when its maps are in the cache.

    Raises:
        CacheError: a shard that is gone or can't be read.
        ValueError: the encoder's scores are not finite.
        OSError: a shard can't be read, or the cache can't be written.
    """
    known = require_shards(urls, cache)
    missing = []
    for url in urls:
        shard_id = known[url].shard_id
        if all(cache.has_entry(shard_id, spec) for spec in specs):
            yield url
        elif cache.summary(shard_id).kept:
            missing.append(url)
        else:
            for spec in specs:
                nothing = np.empty((0, spec.grid, spec.grid), np.float16)
                cache.write_maps(shard_id, spec, nothing)
            yield url
    if not missing:
        return
    samples = load_samples(missing, cache)
    loader = CropLoader(
        samples,
        LoaderConfig(
            batch_size=batch_size,
            image_size=specs[0].image_size,
            view=WholeView(),
            shuffle_buffer=0,  # in the order of rows: a shard is done when the next one begins
            threads=threads,
        ),
        drop_last=False,
        device=device,
    )
    grid = specs[0].grid
    maps = [torch.empty(len(samples), grid, grid, dtype=torch.float16) for _ in specs]
    done = 0
    for crops in loader:
        scored = model_maps(specs, encoder, normalise_images(crops.images))
        for held, new in zip(maps, scored, strict=True):
            held[crops.rows] = new.half().cpu()
        seen = int(crops.rows[-1]) + 1
        while done < len(missing) and samples.first_row[done + 1] <= seen:
            shard_id, first = samples.shard_ids[done], samples.first_row[done]
            for spec, held in zip(specs, maps, strict=True):
                of_shard = held[first : samples.first_row[done + 1]].numpy()
                cache.write_maps(shard_id, spec, of_shard)
            yield samples.urls[done]
            done += 1
