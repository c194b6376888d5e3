"""SBAM's token salience (Choi et al., arXiv 2404.08327, ECCV 2024) as a model score of FAMT."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# SBAM sorts patches by salience plus uniform noise in [0, 0.5], FAMT by log weights plus Gumbel
# noise. Weights exp(salience / T) sort by salience plus T times Gumbel noise; with this T the two
# noises have the same standard deviation.
TEMPERATURE = (0.5 / 12**0.5) / (torch.pi / 6**0.5)


def salience(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Attention that each patch receives from all patches, before the first block.

    With x the embedded patches and their positions: column sums of softmax(x x^T), rows normalised,
    products not scaled; the sums are scaled to [0, 1] in each image.

    Args:
        encoder: a timm ViT with a class token.
        images: `[B, 3, S, S]` float, normalised, of the encoder's size.

    Returns:
        `[B, N]` float32, > 0: weights.
    """
    tokens = (encoder.patch_embed(images) + encoder.pos_embed[:, 1:]).float()
    with torch.autocast(images.device.type, enabled=False):
        received = (tokens @ tokens.transpose(1, 2)).softmax(2).sum(1)
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    span = (high - low).clamp_min(1e-3)  # of a mean of 1; less is rounding
    return torch.exp((received - low) / span / TEMPERATURE)
