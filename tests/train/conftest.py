"""The smallest run that trains."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from samples import RANKS, photo_members, score, tar_bytes
from timm.models.vision_transformer import VisionTransformer

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.scores import ScoreSpec
from famt.train import pretrain
from famt.train.config import OptimiserConfig, Pretrain
from famt.train.signals.config import RefreshConfig


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
        refresh=RefreshConfig(every=40),  # none in three epochs
        device="cpu",
        threads=1,
        log_steps=1,
    )


@pytest.fixture
def encoder() -> VisionTransformer:
    """An untrained one."""
    torch.manual_seed(0)
    return MaskedAutoencoder(MODELS["vit_nano"]).encoder


@pytest.fixture
def begin(config: Pretrain) -> Callable[..., pretrain.Run]:
    """Makes that run, or one with other options, and trains nothing."""
    return lambda **options: pretrain.Run(dataclasses.replace(config, **options), RANKS)


@pytest.fixture
def train(config: Pretrain) -> Callable[..., Path]:
    """Trains that run, or one with other options; returns its folder."""

    def train(**options: object) -> Path:
        changed = dataclasses.replace(config, **options)
        pretrain.main(changed)
        return changed.out

    return train


def _train_tiny(folder: Path, decoder: Literal["self", "cross"]) -> Path:
    shard = folder / "train-000000.tar"
    shard.write_bytes(tar_bytes(photo_members(8)))
    spec = ScoreSpec(grid=7)
    cache = ScoreCache(str(folder / "cache"), create=True)
    score([shard], cache, spec)
    pretrain.main(
        Pretrain(
            shards=[str(shard)],
            cache=cache.url,
            out=folder / "run",
            model="vit_nano",
            image_size=48,
            patch_size=8,
            decoder=decoder,
            epochs=2,
            batch_size=4,
            spec=spec,
            optimiser=OptimiserConfig(base_learning_rate=0.05, warmup_epochs=1, ema_decay=0.5),
            device="cpu",
            threads=1,
            log_steps=1,
        )
    )
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with 36 patches of 8 px and averaged weights, to be read only."""
    return _train_tiny(tmp_path_factory.mktemp("tiny"), "self")


@pytest.fixture(scope="session")
def tiny_cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the cross decoder."""
    return _train_tiny(tmp_path_factory.mktemp("cross"), "cross")
