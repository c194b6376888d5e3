"""The masked autoencoder (MAE), given only the patches it needs.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. MAE and FAMT are the same
class with different splits: MAE masks 75 % at random and throws nothing. Thrown patches have no
tensor here.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from famt.masked import MaskedModel
from famt.models import ModelConfig, sincos_positions
from famt.sampling import PatchSplit

_norm = partial(nn.LayerNorm, eps=1e-6)  # as in timm's ViT


class CrossBlock(nn.Module):
    """The block of CrossMAE: cross-attention and an MLP, each pre-normed and residual.

    Masked patches attend to visible ones, never to each other (Fu et al., "Rethinking Patch
    Dependence for Masked Autoencoders", 2024, arXiv 2401.14391). Every block attends to the
    encoder's last tokens. The paper's variant in which each block attends to a weighted sum of all
    encoder blocks' outputs is not built.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = _norm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = _norm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Masked tokens `hidden [B, M, D]`, visible ones `seen [B, 1+V, D]` -> `[B, M, D]`.

        `seen` is not normed here, since it comes from the encoder's last norm.
        """
        hidden = hidden + self._attend(self.norm1(hidden), seen)
        return hidden + self.mlp(self.norm2(hidden))

    def _attend(self, hidden: Tensor, seen: Tensor) -> Tensor:
        query = self.query(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(seen).unflatten(-1, (2, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MaskedAutoencoder(MaskedModel):
    """A timm ViT encoder of visible patches, and a light decoder that predicts masked ones.

    With decoder "self" (MAE) all tokens attend to each other. With "cross" (CrossMAE) masked tokens
    attend to visible ones alone, so a prediction does not depend on which other patches are masked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width, heads = config.decoder_width, config.decoder_heads
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = sincos_positions(config.grid, width)
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(width, heads)
            if config.decoder == "cross"
            else Block(width, heads, qkv_bias=True, norm_layer=_norm)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = _norm(width)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * 3)
        self.initialise()
        nn.init.normal_(self.mask_token, std=0.02)

    def predict(self, visible: Tensor, split: PatchSplit) -> Tensor:
        """Pixels of the predicted patches `[B, K, P*P*3]`; see `MaskedModel`."""
        latent = self.encode(visible, split.visible)
        return self.decode(latent, split)

    def decode(self, latent: Tensor, split: PatchSplit) -> Tensor:
        """Tokens `[B, prefix+V, width]` -> pixels of the predicted patches `[B, K, P*P*3]`."""
        position = self.decoder_pos_embed
        seen = self.decoder_embed(latent)
        seen_at = torch.cat(
            [position[:, :1].expand(len(seen), self.prefix, -1), position[0, 1 + split.visible]],
            dim=1,
        )
        seen = seen + seen_at
        hidden = self.mask_token + position[0, 1 + split.predicted]
        if self.config.decoder == "cross":
            for block in self.stages(self.decoder_blocks):
                hidden = block(hidden, seen)
        else:
            tokens = torch.cat([seen, hidden], dim=1)
            for block in self.stages(self.decoder_blocks):
                tokens = block(tokens)
            hidden = tokens[:, seen.shape[1] :]
        return self.decoder_pred(self.decoder_norm(hidden))

    def error(self, difference: Tensor) -> Tensor:
        """Squared error."""
        return difference.square()

    @property
    def unofficial(self) -> str | None:
        """A cross decoder or fused blocks; without them all keys are official ones."""
        if self.config.decoder != "self":
            return f"{self.config.decoder} decoder"
        return "fused blocks" if self.config.fused else None
