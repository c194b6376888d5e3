import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from samples import photo_members, tar_bytes

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import score_shard
from famt.pipeline.sharding.shards import Rejected

ID = "0123abcd" * 4


@pytest.fixture
def entry(spec):
    members = [*photo_members(5), ("bad ü.jpg", b"garbage")]
    return score_shard(tar_bytes(members), spec)


def _objects(cache, shard_id=ID):
    root = Path(cache.url) / "shards" / shard_id
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_an_entry_comes_back_as_it_was_written(cache, entry, spec):
    cache.write(ID, entry.table, spec, entry.maps)
    table = cache.read_table(ID)
    assert table.same_rows(entry.table)
    assert [bad.key for bad in table.rejected] == ["bad ü"]
    assert (table.bytes, table.damage) == (entry.table.bytes, None)
    np.testing.assert_array_equal(cache.read_maps(ID, spec), entry.maps)
    assert cache.stored_spec(ID, spec.id) == spec


def test_maps_of_other_samples_are_refused(cache, entry, spec):
    cache.write(ID, entry.table, spec, entry.maps)
    other = dataclasses.replace(entry.table, key=[f"x{key}" for key in entry.table.key])
    with pytest.raises(UserError, match="other samples than"):
        cache.write(ID, other, ScoreSpec(kind="lowpass", grid=7), entry.maps)


def test_a_second_spec_joins_the_same_entry(cache, entry, spec):
    other = ScoreSpec(kind="lowpass", grid=3)
    cache.write(ID, entry.table, spec, entry.maps)
    before = _objects(cache)
    assert not cache.has(ID, other)
    with pytest.raises(CacheError, match=other.id):
        cache.read_maps(ID, other)
    cache.write(ID, entry.table, other, np.ones((5, 3, 3), np.float16))
    after = _objects(cache)
    assert {name: after[name] for name in before} == before
    assert cache.has(ID, spec)
    assert cache.has(ID, other)


@pytest.mark.parametrize(
    "maps",
    [np.ones((4, 7, 7), np.float16), np.ones((5, 7, 7), np.float32),
     np.full((5, 7, 7), np.nan, np.float16), np.zeros((5, 7, 7), np.float16)],
    ids=["too few", "float32", "NaN", "zero"],
)  # fmt: skip
def test_maps_that_do_not_fit_are_never_written(cache, entry, spec, maps):
    with pytest.raises(ValueError, match=r"finite float16|zero all over"):
        cache.write(ID, entry.table, spec, maps)
    assert not cache.has(ID)


def test_a_missing_cache_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no score cache.*famt score"):
        ScoreCache(str(tmp_path / "nowhere"))


def test_what_can_not_be_a_cache_is_named_with_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, said in (
        ("file", "is a file; give a folder"),
        ("link", "is a link to nowhere, which is not there"),
        ("file/deeper", "can't be made: Not a directory; give another folder"),
    ):
        with pytest.raises(OSError, match=f"{tmp_path}/{name} {said}"):
            ScoreCache(str(tmp_path / name), create=True)
    with pytest.raises(UserError, match="give a folder or URL as --cache"):
        ScoreCache("", create=True)


def test_a_cache_travels_to_another_process(cache, entry, spec):
    cache.write(ID, entry.table, spec, entry.maps)
    twin = pickle.loads(pickle.dumps(cache))
    assert twin.read_table(ID).rejected == [Rejected("bad ü", entry.table.rejected[0].reason)]
