"""Ranks that take up a generation that the main one publishes."""

import sys
import time
from pathlib import Path

import torch

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.cache import ScoreCache
from famt.pipeline.generations import Generation
from famt.pipeline.loader import CropBatch
from famt.pipeline.refresh import refresh_shards
from famt.pipeline.scores import ModelScoreSpec, encoder_digest
from famt.pipeline.table import load_samples
from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.signals.config import FrequencyConfig, RefreshConfig
from famt.train.signals.following import FollowedMaps
from famt.train.streams import Stop

folder = Path(sys.argv[1])
options = torch.load(folder / "options.pt")
with join_ranks("cpu") as ranks:
    config = Pretrain(
        shards=options["shards"],
        cache=options["cache"],
        out=folder,
        model="vit_nano",
        frequency=FrequencyConfig("refreshed"),
        refresh=RefreshConfig(every=9),
    )
    cache = ScoreCache(config.cache)
    table = ranks.share(lambda: load_samples(config.shards, cache))
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder.eval()
    followed = FollowedMaps("run-a", config, table, cache, encoder, ranks)
    followed.begin_epoch(0, 0, Stop(), None)
    first = followed.current
    if ranks.is_main:
        spec = ModelScoreSpec("token_frequency", 8, 32, encoder_digest(encoder.state_dict()))
        list(
            refresh_shards(
                encoder,
                table.urls,
                cache,
                [spec],
                batch_size=8,
                threads=1,
                device=torch.device("cpu"),
            )
        )
        cache.generations.publish(Generation("run-a", 0, [spec], table.digest, len(table)))
    for epoch in range(1, 200):
        followed.begin_epoch(epoch, epoch, Stop(), None)
        if followed.current:
            break
        time.sleep(0.1)
    rows = torch.arange(26)
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(26, 4)
    crops = CropBatch(torch.zeros(26, 1, 1, 3), rows, windows, torch.zeros(26, dtype=torch.bool))
    torch.save(
        (first, epoch, followed.current.step, followed.read("token_frequency", crops)),
        folder / f"{ranks.rank}.pt",
    )
    followed.close(finished=True)
