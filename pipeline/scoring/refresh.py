"""Score whole images with an encoder: what an actor of the refresh job does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

from famt.patches import normalise_images
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig, WholeView
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.scoring.model_scores import model_maps


def score_images(
    encoder: VisionTransformer,
    samples: SampleTable,
    specs: Sequence[ModelScoreSpec],
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> dict[ModelScoreSpec, NDArray[np.float16]]:
    """Maps `[R, G, G]` of images by an encoder, by spec; one forward pass an image.

    Whole images are squashed to the encoder's size, as in the paper.

    Args:
        encoder: on `device`, in eval mode.
        specs: equal but for their kinds; their `encoder` is the digest of these weights.
        threads: CPU threads that decode.

    Raises:
        UserError: the encoder's scores are not finite.
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
