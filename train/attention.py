"""Where a run takes the encoder's attention to its crops from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.attention import attention_scores, cls_attention, last_attention
from famt.patches import normalise_images
from pipeline.attention_bank import AttentionBank
from pipeline.loader import CropBatch
from train.config import RollingConfig
from train.distributed import Ranks

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"famt": attention_scores, "amt": cls_attention}


class LiveAttention:
    """Every crop's attention scores from the encoder as it is now.

    Args:
        encoder: of the model in training.
        score: key of `SCORES`.
        image_size: crops are shrunk to this first, px; None leaves them.
        parts: crops go through in this many parts, to save memory.
        bf16: compute under autocast.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        score: str,
        image_size: int | None = None,
        parts: int = 1,
        bf16: bool = False,
    ) -> None:
        self._encoder, self._score = encoder, SCORES[score]
        self._size, self._parts, self._bf16 = image_size, parts, bf16

    def __call__(self, images: Tensor) -> Tensor:
        """Crops `[B, S, S, 3]` uint8 -> `[B, n**2]` float32; n cells a side of what was seen."""
        scores = []
        for part in images.chunk(self._parts):
            pixels = normalise_images(part)
            if self._size is not None:
                pixels = F.interpolate(pixels, self._size, mode="bilinear", antialias=True)
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bf16):
                attention = last_attention(self._encoder, pixels)
            scores.append(self._score(attention))
        return torch.cat(scores)


class RollingAttention:
    """A part of each batch is looked at now; the rest is read from a bank.

    A row comes up once an epoch, on one rank. So the ranks of a machine write into one bank as they
    go, and machines exchange what they refreshed when an epoch ends or a checkpoint is due.
    """

    def __init__(
        self, live: LiveAttention, rows: int, grid: int, config: RollingConfig, here: Ranks
    ) -> None:
        self._live, self._every, self._here, self._grid = live, config.every, here, grid
        self.bank = here.share(lambda: AttentionBank(rows, grid))
        self._unwritten: tuple[CropBatch, Tensor, int] | None = None

    def __call__(self, crops: CropBatch, step: int) -> Tensor:
        """Attention scores of crops, `[B, grid**2]` float32 on their device."""
        self.flush()
        signal = self.bank.read(crops, self._grid)
        chosen = self.bank.oldest(crops.rows, -(-len(crops.rows) // self._every))
        seen = crops.take(chosen)
        scores = self._live(seen.images)
        side = round(scores.shape[1] ** 0.5)
        maps = scores.view(-1, 1, side, side)
        if side != self._grid:
            maps = F.interpolate(maps, self._grid, mode="bilinear")
        signal[chosen.to(signal.device)] = maps.flatten(1)
        # Reading it back here would make a GPU's host wait; the next call finds it ready.
        self._unwritten = (seen, scores, step)
        return signal

    def flush(self) -> None:
        """Write what the last call saw into the bank."""
        if self._unwritten is not None:
            seen, scores, step = self._unwritten
            self._unwritten = None
            self.bank.write(seen, scores.cpu(), step)

    def exchange(self) -> None:
        """Bring the banks of all machines to the same content; every rank calls this."""
        self.flush()
        nodes = self._here.gather(self._here.node)  # also waits for every rank's last write
        if len(set(nodes)) > 1:
            leads = nodes.index(self._here.node) == self._here.rank
            sent = self._here.gather(self.bank.news() if leads else None)
            for node, news in zip(nodes, sent, strict=True):
                if leads and news is not None and node != self._here.node:
                    self.bank.merge(*news)
            self._here.gather(None)
