"""The masked autoencoder (MAE), given only the patches it needs.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. MAE and FAMT are the same
class with different splits: MAE masks 75 % at random and throws nothing. Thrown patches have no
tensor here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from famt.decoders import DECODERS
from famt.masked import MaskedModel
from famt.models import ModelConfig, sincos_positions
from famt.sampling import PatchSplit

_norm = partial(nn.LayerNorm, eps=1e-6)  # as in timm's ViT


class MaskedAutoencoder(MaskedModel):
    """A timm ViT encoder of visible patches, and a light decoder that predicts masked ones.

    With decoder "self" (MAE) all tokens attend to each other. With "cross" (CrossMAE) masked tokens
    attend to visible ones alone (see `famt.decoders`), so a prediction does not depend on which
    other patches are masked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decoder_embed = nn.Linear(config.width, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder_pos_embed = sincos_positions(config.grid, config.decoder_width)
        self.decoder = DECODERS[config.decoder]
        self.decoder_blocks = nn.ModuleList(
            self.decoder.block(config.decoder_width, config.decoder_heads, norm_layer=_norm)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = _norm(config.decoder_width)
        self.decoder_pred = nn.Linear(config.decoder_width, config.patch_size**2 * 3)
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
        hidden = self.mask_token + position[0, 1 + split.predicted]
        seen = seen + seen_at
        hidden = self.decoder.run(self.stages(self.decoder_blocks), hidden, seen)
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
