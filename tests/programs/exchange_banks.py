"""Ranks that write their rows for two steps, and exchange banks after each."""

import sys
from pathlib import Path

import torch
from samples import Rows, context

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.loading.loader import CropBatch
from famt.train.distributed import join_ranks
from famt.train.signals.attention import Rolling
from famt.train.signals.config import AttentionConfig

with join_ranks("cpu") as ranks:
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    rolling = Rolling(AttentionConfig(every=1), context(encoder, Rows(9), ranks))
    images = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)
    for step in range(2):
        rows = torch.arange(9)[ranks.rank + 4 * step :: 3][: 2 - step]
        windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(rows), 4)
        flips = torch.zeros(len(rows), dtype=torch.bool)
        rolling.read(CropBatch(images[rows], rows, windows, flips), step)
        rolling.synchronise()
    torch.save(rolling.state_dict(), Path(sys.argv[1], f"{ranks.rank}.pt"))
