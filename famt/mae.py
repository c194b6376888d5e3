"""The masked autoencoder that only ever sees the patches it needs.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. Plain MAE is this class
with a split drawn from uniform weights, 75 % masked and nothing thrown; FAMT is the same class with
another split. Thrown patches have no tensor here at all.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from famt.decoder import CrossBlock
from famt.models import ModelConfig, sincos_positions
from famt.sampling import PatchSplit

_norm = partial(nn.LayerNorm, eps=1e-6)  # as in timm's ViT


class MaskedAutoencoder(nn.Module):
    """A timm ViT encoder over visible patches and a light decoder that fills in the masked ones.

    Attributes:
        encoder: a timm `VisionTransformer` with fixed 2-D sin-cos positions and no head; its keys
            are timm's own, and with the self decoder's those of the official MAE checkpoints
            (see `famt.export`).

    The decoder "self" is MAE's: visible and masked tokens all attend to each other. "cross" is
    CrossMAE's: masked tokens attend to visible ones alone (see `famt.decoder`), so what is
    predicted for one does not depend on which others are masked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.encoder()
        self.decoder_embed = nn.Linear(config.width, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder_pos_embed = sincos_positions(config.grid, config.decoder_width)
        block = partial(Block, qkv_bias=True) if config.decoder == "self" else CrossBlock
        self.decoder_blocks = nn.ModuleList(
            block(config.decoder_width, config.decoder_heads, norm_layer=_norm)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = _norm(config.decoder_width)
        self.decoder_pred = nn.Linear(config.decoder_width, config.patch_size**2 * 3)
        self._initialise()

    def forward(
        self,
        visible: Tensor,
        masked: Tensor,
        split: PatchSplit,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of masked patches, predicted from the visible ones.

        Args:
            visible: `[B, V, P*P*3]` float, normalised pixels of `split.visible`.
            masked: `[B, K, P*P*3]` float, normalised pixels of `split.predicted`.
            split: where the patches lie.
            loss_weights: `[B, K]`, what each patch's error is multiplied by.

        Returns:
            scalar loss, float32.
        """
        latent = self.encode(visible, split.visible)
        prediction = self.decode(latent, split)
        return self.loss(prediction, masked, loss_weights)

    def encode(self, patches: Tensor, index: Tensor) -> Tensor:
        """Patches `[B, V, P*P*3]` at positions `index [B, V]` -> tokens `[B, 1+V, width]`."""
        encoder, position = self.encoder, self.encoder.pos_embed
        projection = encoder.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = F.linear(patches, weight, projection.bias) + position[0, 1 + index]
        cls = (encoder.cls_token + position[:, :1]).expand(len(tokens), -1, -1)
        return encoder.norm(encoder.blocks(torch.cat([cls, tokens], dim=1)))

    def decode(self, latent: Tensor, split: PatchSplit) -> Tensor:
        """Tokens `[B, 1+V, width]` -> pixels of the predicted patches `[B, K, P*P*3]`."""
        position = self.decoder_pos_embed
        seen = self.decoder_embed(latent)
        seen_at = torch.cat(
            [position[:, :1].expand(len(seen), -1, -1), position[0, 1 + split.visible]], dim=1
        )
        hidden = self.mask_token + position[0, 1 + split.predicted]
        seen = seen + seen_at
        if self.config.decoder == "self":
            tokens = torch.cat([seen, hidden], dim=1)
            for block in self.decoder_blocks:
                tokens = block(tokens)
            hidden = tokens[:, seen.shape[1] :]
        else:
            for block in self.decoder_blocks:
                hidden = block(hidden, seen)
        return self.decoder_pred(self.decoder_norm(hidden))

    def loss(
        self, prediction: Tensor, masked: Tensor, loss_weights: Tensor | None = None
    ) -> Tensor:
        """Mean squared error against `masked`, in float32 whatever the autocast."""
        error = (prediction.float() - self.target(masked)).square()
        return error.mean() if loss_weights is None else (error.mean(-1) * loss_weights).mean()

    def target(self, masked: Tensor) -> Tensor:
        """What the decoder is asked for: the pixels, by default normalised within each patch."""
        masked = masked.float()
        if not self.config.normalise_targets:
            return masked
        variance, mean = torch.var_mean(masked, dim=-1, keepdim=True)
        return (masked - mean) / (variance + 1e-6).sqrt()

    def _initialise(self) -> None:
        """MAE's own initialisation: Xavier for every linear map, the patch projection included."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
