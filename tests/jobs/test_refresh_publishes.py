import shutil
from pathlib import Path

import torch

from famt.jobs import refresh_scores
from famt.jobs.options import RefreshScores
from famt.mae import MaskedAutoencoder
from famt.models import MODELS, ModelConfig
from famt.pipeline.refresh import refresh_shards
from famt.train.checkpoint import Encoder


def test_a_generation_that_lost_maps_meanwhile_is_not_published(scored, monkeypatch):
    model = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    encoder = Encoder(
        run="run-a", step=7, sizes=vars(ModelConfig.of(model)), weights=model.state_dict(),
        config={"precision": "fp32"}, kinds=["attention"], urls=scored.shards,
    )  # fmt: skip
    losses = [1, 0]

    def score_all(urls, encoder, cache, specs, args, over):
        device = torch.device("cpu")
        list(
            refresh_shards(model.eval(), urls, cache, specs, batch_size=8, threads=1, device=device)
        )
        maps = sorted(Path(cache.url).glob(f"shards/*/{specs[0].id}"))
        for each in maps[: losses.pop(0)]:
            shutil.rmtree(each)
        return {}

    monkeypatch.setattr(refresh_scores, "_score_all", score_all)
    args = RefreshScores(cache=scored.cache.url)
    failed = refresh_scores._refresh(encoder, args)
    assert [reason.partition(";")[0] for reason in failed.values()] == [
        "its maps were deleted while others were made"
    ]
    assert scored.cache.generations.of("run-a") == []
    assert refresh_scores._refresh(encoder, args) == {}
    assert [each.step for each in scored.cache.generations.of("run-a")] == [7]
