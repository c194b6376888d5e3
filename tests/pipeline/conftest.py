import pytest

from famt.pipeline.loading.dataset import load_samples


@pytest.fixture
def table(scored):
    """The samples of `scored`."""
    return load_samples(scored.shards, scored.cache)
