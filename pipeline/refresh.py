"""Score whole images with an encoder: the pure kernel under the refresh job."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from famt.patches import normalise_images
from pipeline.cache import ScoreCache
from pipeline.loader import CropLoader, LoaderConfig, WholeView
from pipeline.scores import ModelScoreSpec
from pipeline.table import load_samples, require_shards


def refresh_shards(
    encoder: VisionTransformer,
    urls: list[str],
    cache: ScoreCache,
    spec: ModelScoreSpec,
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
        spec: what to compute; `spec.encoder` is the digest of this encoder's weights.
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
        if cache.has_entry(shard_id, spec):
            yield url
        elif cache.summary(shard_id).kept:
            missing.append(url)
        else:
            nothing = np.empty((0, spec.grid, spec.grid), np.float16)
            cache.write_maps(shard_id, spec, nothing)
            yield url
    if not missing:
        return
    table = load_samples(missing, cache)
    loader = CropLoader(
        table,
        LoaderConfig(
            batch_size=batch_size,
            image_size=spec.image_size,
            view=WholeView(),
            shuffle_buffer=0,  # in the order of rows: a shard is done when the next one begins
            threads=threads,
        ),
        drop_last=False,
        device=device,
    )
    maps = torch.empty(len(table), spec.grid, spec.grid, dtype=torch.float16)
    done = 0
    for crops in loader:
        maps[crops.rows] = spec.score(encoder, normalise_images(crops.images)).half().cpu()
        seen = int(crops.rows[-1]) + 1
        while done < len(missing) and table.first_row[done + 1] <= seen:
            shard_id, first = table.shard_ids[done], table.first_row[done]
            of_shard = maps[first : table.first_row[done + 1]].numpy()
            cache.write_maps(shard_id, spec, of_shard)
            yield table.urls[done]
            done += 1
