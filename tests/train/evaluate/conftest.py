"""A trained encoder, and evaluations of it that take no time."""

from collections.abc import Callable

import pytest

from famt.train.config import Pretrain
from famt.train.evaluate.evaluation import Evaluation
from famt.train.pretrain import main as pretrain


@pytest.fixture
def trained(scored, tmp_path) -> Pretrain:
    """One epoch on 26 labelled images."""
    config = Pretrain(
        shards=scored.shards, cache=scored.cache.url, out=tmp_path / "run", model="vit_nano",
        epochs=1, batch_size=8, spec=scored.spec, device="cpu", threads=1,
    )  # fmt: skip
    pretrain(config)
    return config


@pytest.fixture
def options(scored, tmp_path) -> Callable[..., Evaluation]:
    """Options of an evaluation of that run: 17 images to learn from, 9 to test on."""

    def make(kind: type[Evaluation], **others: object) -> Evaluation:
        known: dict[str, object] = {
            "checkpoint": str(tmp_path / "run"), "cache": scored.cache.url,
            "train": scored.shards[:2], "val": scored.shards[2:],
            "device": "cpu", "threads": 1, "batch_size": 8,
        }  # fmt: skip
        return kind(**(known | others))

    return make
