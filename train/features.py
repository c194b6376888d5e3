"""Features of whole images from a frozen encoder, for the probes."""

from __future__ import annotations

from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from famt.patches import normalise_images
from pipeline.cache import ScoreCache
from pipeline.loader import CentreView, CropLoader, LoaderConfig
from pipeline.table import load_samples

Pool = Literal["cls", "mean"]


def labelled_features(
    encoder: VisionTransformer,
    shards: list[str],
    cache: ScoreCache,
    *,
    centre: float,
    batch_size: int,
    pool: Pool,
    threads: int,
    device: torch.device,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Run every labelled image of some shards through an encoder, once each.

    Args:
        encoder: frozen; put into eval mode and onto `device`.
        shards: see `pipeline.storage.expand`; scored before, whatever the score.
        cache: where their tables are.
        centre: share of the shorter side that the central crop shows.
        pool: the class token, or the mean of the patch tokens, after the last norm.
        name: what to call the progress bar.

    Returns:
        features `[R, C]` float32 and labels `[R]` int64, on the CPU.

    Raises:
        ValueError: an image has no class.
    """
    table = load_samples(shards, cache)
    missing = (table.labels < 0).nonzero()
    if len(missing):
        raise ValueError(
            f"{table.key(int(missing[0]))} and {len(missing) - 1} more samples have no class; a "
            "probe needs a <key>.cls beside every image"
        )
    loader = CropLoader(
        table,
        LoaderConfig(
            batch_size=batch_size,
            image_size=encoder.patch_embed.img_size[0],
            view=CentreView(centre),
            shuffle_buffer=0,
            threads=threads,
        ),
        drop_last=False,
        device=device,
    )
    encoder = encoder.to(device).eval()
    features, rows = [], []
    with torch.inference_mode(), tqdm(total=len(table), desc=name, unit=" images") as bar:
        for crops in loader:
            tokens = encoder.forward_features(normalise_images(crops.images))
            pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
            features.append(pooled.float().cpu())
            rows.append(crops.rows)
            bar.update(len(crops.rows))
    return torch.cat(features), table.labels[torch.cat(rows)]
