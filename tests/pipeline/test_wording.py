from famt.pipeline.wording import counted


def test_a_count_agrees_with_its_noun():
    assert [counted(n, "shard") for n in range(3)] == ["0 shards", "1 shard", "2 shards"]
    assert [counted(n, "class") for n in (1, 20)] == ["1 class", "20 classes"]
