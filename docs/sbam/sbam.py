"""SBAM's token salience as a model score of FAMT."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def salience(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """How much the other patches look at each patch, before the first block.

    Choi et al., "Salience-Based Adaptive Masking", ECCV 2024, arXiv 2404.08327, as its released
    code computes it. Of patch embeddings x, positions included: `s_j = sum_i softmax_j(x_i . x_j)`,
    then scaled to [0, 1] in each image.

    Args:
        encoder: timm ViT; only its patch embedding and positions are used.
        images: `[B, 3, S, S]` float, normalised.

    Returns:
        `[B, N]` float32, `exp` of that: the draw takes logarithms of weights. An image whose
        patches are all alike has the same salience everywhere.
    """
    tokens = encoder._pos_embed(encoder.patch_embed(images))[:, encoder.num_prefix_tokens :].float()
    received = (tokens @ tokens.mT).softmax(2).sum(1)
    low, high = received.aminmax(dim=1, keepdim=True)
    return torch.exp((received - low) / (high - low).clamp_min(1e-6))
