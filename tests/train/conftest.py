"""The smallest run that trains."""

from pathlib import Path

import pytest

from train.config import OptimiserConfig, Pretrain


@pytest.fixture
def config(scored, tmp_path: Path) -> Pretrain:
    """Three epochs of three steps on 26 images, in a folder that is there already."""
    (tmp_path / "run").mkdir()
    return Pretrain(
        shards=scored.shards,
        cache=scored.cache.url,
        out=tmp_path / "run",
        model="vit_nano",
        epochs=3,
        batch_size=8,
        spec=scored.spec,
        optimiser=OptimiserConfig(base_learning_rate=0.05, warmup_epochs=1),
        device="cpu",
        threads=1,
        log_steps=1,
    )
