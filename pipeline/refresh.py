"""Score whole images with an encoder: the pure kernel under the refresh job."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

from famt.patches import normalise_images
from famt.pipeline.dataset import SampleTable
from famt.pipeline.loader import CropLoader
from famt.pipeline.model_scores import model_maps
from famt.pipeline.options import LoaderConfig, WholeView
from famt.pipeline.scores import ModelScoreSpec


def score_images(
    encoder: VisionTransformer,
    samples: SampleTable,
    specs: Sequence[ModelScoreSpec],
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> dict[ModelScoreSpec, NDArray[np.float16]]:
    """Maps `[R, G, G]` that an encoder gives of images, a row a sample, by one forward pass each.

    Images are squashed to the encoder's size whole, as the paper does.

    Args:
        encoder: on `device`, in eval mode.
        samples: the images.
        specs: what to compute, alike but for their kinds; their `encoder` is the digest of this
            encoder's weights.
        batch_size: images at a time.
        threads: that decode.

    Raises:
        ValueError: the encoder's scores are not finite.
        OSError: a shard can't be read.
    """
    loader = CropLoader(
        samples,
        LoaderConfig(
            batch_size=batch_size,
            image_size=specs[0].image_size,
            view=WholeView(),
            shuffle_buffer=0,
            threads=threads,
        ),
        drop_last=False,
        device=device,
    )
    maps = {
        spec: torch.empty(len(samples), spec.grid, spec.grid, dtype=torch.float16) for spec in specs
    }
    for crops in loader:
        scored = model_maps(specs, encoder, normalise_images(crops.images))
        for spec, new in zip(specs, scored, strict=True):
            maps[spec][crops.rows] = new.half().cpu()
    return {spec: each.numpy() for spec, each in maps.items()}
