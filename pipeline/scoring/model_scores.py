"""Compute the scores that `ModelScoreSpec` names.

Apart from `famt.pipeline.scores`, so that workers that score pixels need no timm: 125 MB, 2 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.attention import attention_scores, cls_attention, last_attention, last_block
from famt.frequency import token_frequency
from famt.patches import normalise_images
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig, WholeView
from famt.pipeline.scores import ModelScoreSpec, checked_maps, model_plugin

# Functions of the last block's attention [B, H, N+1, N+1] and patch tokens [B, N, C].
_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": lambda attention, _: attention_scores(attention),  # FAMT's formula
    "cls_attention": lambda attention, _: cls_attention(attention),  # AMT's formula
    "token_frequency": lambda _, tokens: token_frequency(tokens),
    # The paper's weight.
    "frequency_attention": lambda attention, tokens: (
        token_frequency(tokens) * attention_scores(attention)
    ),
}
_OF_TOKENS = {"token_frequency", "frequency_attention"}


def model_scores(
    kinds: Sequence[str], encoder: VisionTransformer, images: Tensor
) -> dict[str, Tensor]:
    """Scores of images by an encoder; all of this project's kinds take one forward pass.

    Args:
        kinds: of `MODEL_KINDS`, or of other packages.
        images: `[B, 3, S, S]` float, normalised.

    Returns:
        `[B, N]` float, >= 0, by kind.

    Raises:
        UserError: no such kind is installed, or the encoder has no class token.
    """
    require_class_token(kinds, encoder)
    attention = tokens = torch.empty(0)  # of kinds that read neither
    with torch.no_grad():
        if not _OF_TOKENS.isdisjoint(kinds):
            attention, tokens = last_block(encoder, images)
        elif not _SCORES.keys().isdisjoint(kinds):
            attention = last_attention(encoder, images)
        return {
            kind: _SCORES[kind](attention, tokens)
            if kind in _SCORES
            else model_plugin(kind).load()(encoder, images)
            for kind in kinds
        }


def require_class_token(kinds: Sequence[str], encoder: VisionTransformer) -> None:
    """Refuse an encoder without a class token, which the scores of this package need."""
    ours = [kind for kind in kinds if kind in _SCORES]
    if ours and not encoder.has_class_token:
        raise UserError(
            f"{', '.join(ours)}: scores of a model need its class token, and this one has none; "
            "weigh by --frequency.source cached alone, or train by --recipe uniform"
        )


def score_crops(
    kind: str, encoder: VisionTransformer, images: Tensor, size: int | None = None
) -> Tensor:
    """Score the patches of crops by a model.

    Args:
        images: `[B, S, S, 3]` uint8.
        size: side to which crops are shrunk first, px; None leaves them.

    Returns:
        `[B, n**2]` float, >= 0; the encoder sees n patches a side.
    """
    pixels = normalise_images(images)
    if size not in (None, pixels.shape[-1]):
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return model_scores([kind], encoder, pixels)[kind]


def model_maps(
    specs: Sequence[ModelScoreSpec], encoder: VisionTransformer, images: Tensor
) -> list[Tensor]:
    """Maps of images by several specs of one encoder: `[B, grid, grid]` float32, mean 1 an image.

    Args:
        specs: equal but for their kinds.
        images: `[B, 3, S, S]` float, normalised.

    Raises:
        UserError: no such kind is installed, or a score is not finite and >= 0.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=specs[0].precision == "bf16"):
        scores = model_scores([spec.kind for spec in specs], encoder, images)
    return [
        checked_maps(
            scores[spec.kind].unflatten(1, (spec.grid, spec.grid)),
            (len(images), spec.grid, spec.grid),
            spec.kind,
        )
        for spec in specs
    ]


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
