"""Ranks that take up a generation that the main one made."""

import sys
from pathlib import Path

import torch

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.scores import ModelScoreSpec, encoder_digest
from famt.pipeline.scoring.generation import write_generation
from famt.pipeline.scoring.model_scores import score_images
from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.signals.config import FrequencyConfig, RefreshConfig
from famt.train.signals.refresh_folder import RefreshFolder
from famt.train.signals.refreshed_maps import RefreshedMaps
from famt.train.stop import Stop

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
    maps = RefreshedMaps("run-a", config, table, encoder, ranks)
    maps.begin_epoch(0, 0, Stop(), None)
    first = maps.current
    if ranks.is_main:
        spec = ModelScoreSpec("token_frequency", 8, 32, encoder_digest(encoder.state_dict()))
        cpu = torch.device("cpu")
        made = score_images(encoder, table, [spec], batch_size=8, threads=1, device=cpu)
        write_generation(RefreshFolder(folder).generation(7), "run-a", table.digest, made)
    ranks.gather(None)
    maps.begin_epoch(1, 1, Stop(), None)
    rows = torch.arange(26)
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(26, 4)
    crops = CropBatch(torch.zeros(26, 1, 1, 3), rows, windows, torch.zeros(26, dtype=torch.bool))
    found = first, maps.current, maps.read("token_frequency", crops)
    torch.save(found, folder / f"{ranks.rank}.pt")
    maps.close(finished=True)
