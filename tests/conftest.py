"""Real shards and a real cache for every test that wants them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from samples import score, write_shards

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.scores import ScoreSpec

settings.register_profile("any machine", deadline=None)  # no test fails for being slow
settings.load_profile("any machine")


@dataclass(frozen=True)
class Scored:
    """Shards on disk with their scores in a cache."""

    folder: Path
    shards: list[str]
    cache: ScoreCache
    spec: ScoreSpec


@pytest.fixture
def spec() -> ScoreSpec:
    return ScoreSpec(grid=7)


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    """An empty one on disk."""
    return ScoreCache(str(tmp_path / "cache"), create=True)


@pytest.fixture
def scored(tmp_path: Path, spec: ScoreSpec, cache: ScoreCache) -> Scored:
    """Three shards of 10, 7 and 9 images, scored."""
    shards = write_shards(tmp_path / "shards", 10, 7, 9)
    score(shards, cache, spec)
    return Scored(tmp_path / "shards", [str(path) for path in shards], cache, spec)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
