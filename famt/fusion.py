"""Shallow features for the decoder, so that the last block need not carry every detail.

Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability" (MFF), ICCV 2023
(arXiv 2308.00261): outputs of some blocks, each through its own linear layer, are averaged with
that of the last block; the weights are learned, under a softmax. The exported encoder has none of
this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class BlockFusion(nn.Module):
    """Learned average of the outputs of some blocks and the last one.

    Args:
        width: of tokens.
        blocks: numbers of the shallow blocks, from 0, rising, without the last.
    """

    def __init__(self, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = blocks
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in blocks)
        self.weights = nn.Parameter(torch.ones(len(blocks) + 1))

    def forward(self, blocks: Iterable[Callable[[Tensor], Tensor]], tokens: Tensor) -> Tensor:
        """Run all `blocks` on tokens `[B, T, width]`; returns the average, of the same shape."""
        projections, shallow = dict(zip(self.blocks, self.projections, strict=True)), []
        for number, block in enumerate(blocks):
            tokens = block(tokens)
            if number in projections:
                shallow.append(projections[number](tokens))
        weights = self.weights.softmax(0)
        return sum(weight * each for weight, each in zip(weights, [*shallow, tokens], strict=True))  # type: ignore[return-value]
