import pytest

from famt.pipeline.wording import counted


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "shard", "0 shards"),
        (1, "shard", "1 shard"),
        (2, "shard", "2 shards"),
        (1, "class", "1 class"),
        (20, "class", "20 classes"),
    ],
)
def test_a_count_agrees_with_its_noun(count, noun, text):
    assert counted(count, noun) == text
