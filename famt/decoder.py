"""The decoder block of CrossMAE: masked patches attend to visible ones, never to each other.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", 2024 (arXiv 2401.14391).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


class CrossBlock(nn.Module):
    """Cross-attention and an MLP, each pre-normed and residual.

    Every block attends to the encoder's last tokens. The paper's variant in which each block
    attends to a weighted sum of all encoder blocks' outputs is not built.
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
