"""Attention by an extra forward pass, on all crops or on a part of each batch."""

from __future__ import annotations

import torch
from torch import Tensor

from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.scores import check_model_kinds
from famt.pipeline.scoring.model_scores import score_crops
from famt.pipeline.scoring.rolling import RollingScores, half_size
from famt.train.signals.banked import Banked
from famt.train.signals.config import AttentionConfig
from famt.train.signals.signal import Context, Signal


class Live(Signal):
    """A score of every crop by the current encoder.

    Args:
        image_size: side that crops are resized to first, px; None keeps their size.
    """

    def __init__(
        self, slot: AttentionConfig, context: Context, image_size: int | None = None
    ) -> None:
        check_model_kinds([slot.kind])
        self.exponent, self._kind, self.size = slot.exponent, slot.kind, image_size
        self._encoder, self._parts = context.encoder, context.parts
        self._bf16 = context.bf16

    def read(self, crops: CropBatch, step: int) -> Tensor:
        return self.score(crops.images)

    def score(self, images: Tensor) -> Tensor:
        """Crops `[B, S, S, 3]` uint8 -> scores `[B, n**2]` float32 of n x n patches."""
        scores = []
        for part in images.chunk(self._parts):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
                scores.append(score_crops(self._kind, self._encoder, part, self.size))
        return torch.cat(scores)

    def describe(self) -> str:
        return f"live {self._kind} of every crop to the power {self.exponent:g}"


class Rolling(Banked):
    """Scores a part of each batch with the current encoder, and reads the rest from a bank."""

    def __init__(self, slot: AttentionConfig, context: Context) -> None:
        super().__init__(slot.exponent, context)
        self._kind, self._every = slot.kind, slot.every
        half = half_size(context.sizes.image_size, context.sizes.patch_size)
        self._live = Live(slot, context, slot.image_size or half)
        self._rolling = RollingScores(self.bank, self.grid, self._live.score, slot.every)

    def read(self, crops: CropBatch, step: int) -> Tensor:
        return self._rolling.read(crops, step)

    def describe(self) -> str:
        return (
            f"rolling {self._kind}, kept for each image, to the power {self.exponent:g}, updated "
            f"for 1/{self._every} of each batch, at {self._live.size} px"
        )
