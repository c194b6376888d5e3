"""A cache on a full disk: one error, which names the cache and what helps."""

from pathlib import Path

import pytest
from samples import photo_members, tar_bytes

from famt.pipeline import storage
from famt.pipeline.errors import CacheFullError
from famt.pipeline.scoring.judge import judge_shards
from famt.pipeline.scoring.precompute import precompute_shard


@pytest.mark.parametrize("number", [28, 122])  # ENOSPC, EDQUOT
def test_no_room_and_no_quota_end_all_work_at_once(tmp_path, cache, spec, monkeypatch, number):
    urls = [str(tmp_path / f"{n}.tar") for n in range(40)]
    for n, url in enumerate(urls):
        Path(url).write_bytes(tar_bytes(photo_members(2, 2 * n)))
    puts = []

    def refuse(store, path, data, **options):
        puts.append(path)
        raise storage.BaseError(f"Unable to copy data to file: no more (os error {number})")

    monkeypatch.setattr(storage.obstore, "put", refuse)
    with pytest.raises(CacheFullError, match=rf"score cache {cache.url} is full .* gc --cache"):
        precompute_shard(urls[0], cache, spec)
    with pytest.raises(CacheFullError, match="is full"):
        judge_shards(urls, cache)
    assert len(puts) < 20
