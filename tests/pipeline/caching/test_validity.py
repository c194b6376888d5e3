import os
import shutil
from pathlib import Path

from famt.pipeline.caching.validity import look_up
from famt.pipeline.scores import ScoreSpec


def test_what_was_scored_and_has_not_changed_lacks_nothing(scored, spec):
    for asked in (spec, None):
        shards = look_up(scored.shards, scored.cache, asked)
        assert list(shards.records) == scored.shards
        assert shards.stale == {}


def test_each_lack_is_told_from_the_others(scored, spec):
    urls = [*scored.shards, str(scored.folder / "new.tar"), str(scored.folder / "none.tar")]
    shutil.copy(urls[0], urls[3])
    os.utime(urls[1], (1, 1))
    ids = {url: each.shard_id for url, each in scored.cache.manifests.lookup(urls).items()}
    (Path(scored.cache.url) / "shards" / ids[urls[0]] / "table.zip").unlink()
    lacks = {urls[0]: "table", urls[1]: "hash", urls[3]: "record", urls[4]: "file"}
    found = look_up(urls, scored.cache, None).stale
    assert {url: each.lacks for url, each in found.items()} == lacks
    found = look_up(urls, scored.cache, ScoreSpec(kind="lowpass")).stale
    assert {url: each.lacks for url, each in found.items()} == {**lacks, urls[2]: "maps"}
