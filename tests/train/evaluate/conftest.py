"""A trained encoder, and evaluations of it that take no time."""

import dataclasses
from collections.abc import Callable

import pytest

from famt.train.config import Pretrain
from famt.train.evaluate.evaluation import Evaluation
from famt.train.pretrain import main as pretrain


@pytest.fixture
def trained(config) -> Pretrain:
    """One epoch on 26 labelled images."""
    short = dataclasses.replace(config, epochs=1)
    pretrain(short)
    return short


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
