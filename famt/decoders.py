"""Decoders of the masked autoencoder, by name: their blocks, and which tokens attend to which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class CrossBlock(nn.Module):
    """The block of CrossMAE: cross-attention and an MLP, each pre-normed and residual.

    Masked patches attend to visible ones, never to each other (Fu et al., "Rethinking Patch
    Dependence for Masked Autoencoders", 2024, arXiv 2401.14391). Every block attends to the
    encoder's last tokens. The paper's variant in which each block attends to a weighted sum of all
    encoder blocks' outputs is not built.
    """

    def __init__(self, width: int, heads: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = norm_layer(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = norm_layer(width)
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


@dataclass(frozen=True)
class Decoder:
    """How masked patches are decoded.

    Attributes:
        block: makes a block of `(width, heads, norm_layer=...)`.
        run: blocks, masked tokens `[B, M, D]` and visible ones `[B, 1+V, D]` -> `[B, M, D]`.
    """

    block: Callable[..., nn.Module]
    run: Callable[[Iterable[Callable[..., Tensor]], Tensor, Tensor], Tensor]


def _all_attend_to_all(
    blocks: Iterable[Callable[..., Tensor]], hidden: Tensor, seen: Tensor
) -> Tensor:
    tokens = torch.cat([seen, hidden], dim=1)
    for block in blocks:
        tokens = block(tokens)
    return tokens[:, seen.shape[1] :]


def _masked_attend_to_visible(
    blocks: Iterable[Callable[..., Tensor]], hidden: Tensor, seen: Tensor
) -> Tensor:
    for block in blocks:
        hidden = block(hidden, seen)
    return hidden


# Names as in `famt.models.DecoderName`.
DECODERS = {
    "self": Decoder(partial(Block, qkv_bias=True), _all_attend_to_all),
    "cross": Decoder(CrossBlock, _masked_attend_to_visible),
}
