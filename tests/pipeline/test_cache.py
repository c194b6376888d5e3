import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from samples import photo_members, tar_bytes

from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.precompute import score_shard
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.sealed import seal_zarr
from famt.pipeline.shards import Rejected

ID = "0123abcd" * 4


@pytest.fixture
def cache(tmp_path):
    return ScoreCache(str(tmp_path / "cache"), create=True)


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
    assert table.key == entry.table.key
    for name in ("offset", "size", "label"):
        np.testing.assert_array_equal(getattr(table, name), getattr(entry.table, name))
    assert [bad.key for bad in table.rejected] == ["bad ü"]
    assert (table.bytes, table.damage) == (entry.table.bytes, None)
    np.testing.assert_array_equal(cache.read_maps([ID], spec)[0], entry.maps)
    assert cache.summary(ID).kept == 5


def test_an_entry_is_complete_only_when_its_last_object_is_there(cache, entry, spec, tmp_path):
    cache.write(ID, entry.table, spec, entry.maps)
    written = _objects(cache)
    root = Path(cache.url) / "shards" / ID
    times = {name: (root / name).stat().st_mtime_ns for name in written}
    order = sorted(written, key=times.__getitem__)
    assert order[-1] == f"{spec.id}/zarr.json"
    for cut in range(len(order)):  # a writer that is killed after each object in turn
        shutil.rmtree(root)
        for name in order[:cut]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(written[name])
        assert not cache.has_entry(ID, spec)
        with pytest.raises(CacheError, match=r"no whole entry|has no maps"):
            cache.read_maps([ID], spec)[0]
        cache.write(ID, entry.table, spec, entry.maps)
        assert _objects(cache) == written
        assert cache.has_entry(ID, spec)


def _all_of(cache, spec):
    """Everything that a reader can get of the entry."""
    table = cache.read_table(ID)
    maps = cache.read_maps([ID], spec)[0]
    described = (
        table.key,
        table.rejected,
        table.bytes,
        table.damage,
        cache.stored_spec(ID, spec.id),
    )
    return [described, *(a.tobytes() for a in (table.offset, table.size, table.label, maps))]


def test_no_flipped_bit_and_no_missing_end_is_ever_believed(cache, entry, spec):
    """Each object of an entry in turn: gone, cut short, and every 101st bit of it flipped."""
    cache.write(ID, entry.table, spec, entry.maps)
    whole = _all_of(cache, spec)
    noticed = harmless = 0
    said = set()
    for name, data in _objects(cache).items():
        path = Path(cache.url) / "shards" / ID / name
        versions = [None, *(data[:end] for end in (0, 1, 3, len(data) // 2, len(data) - 1))]
        for bit in range(0, 8 * len(data), 101):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            versions.append(bytes(flipped))
        for version in versions:
            path.unlink() if version is None else path.write_bytes(version)
            try:
                assert _all_of(cache, spec) == whole
                harmless += 1
            except CacheError as error:
                noticed += 1
                said.add(re.sub(r"\(.*\)", "", str(error)))
            path.write_bytes(data)
    assert noticed > 20 * harmless  # spaces of a zarr.json
    assert all(ID in each and re.search("Remove|precompute_freq", each) for each in said)


@pytest.mark.parametrize("name", ["samples", "key", "maps"])
def test_an_object_that_went_missing_is_never_read_as_zeros(cache, entry, spec, name):
    cache.write(ID, entry.table, spec, entry.maps)
    chunks = Path(cache.url) / "shards" / ID / (spec.id if name == "maps" else name) / "c"
    shutil.rmtree(chunks)
    with pytest.raises(CacheError, match=r"damaged \(it is gone\)"):
        _all_of(cache, spec)


def test_maps_of_other_samples_are_refused(cache, entry, spec):
    cache.write(ID, entry.table, spec, entry.maps)
    other = dataclasses.replace(entry.table, key=[f"x{key}" for key in entry.table.key])
    with pytest.raises(ValueError, match="other samples than"):
        cache.write(ID, other, ScoreSpec(kind="lowpass", grid=7), entry.maps)


def test_a_second_spec_joins_the_same_entry(cache, entry, spec):
    other = ScoreSpec(kind="lowpass", grid=3)
    cache.write(ID, entry.table, spec, entry.maps)
    before = _objects(cache)
    assert not cache.has_entry(ID, other)
    with pytest.raises(CacheError, match=other.id):
        cache.read_maps([ID], other)[0]
    cache.write(ID, entry.table, other, np.ones((5, 3, 3), np.float16))
    after = _objects(cache)
    assert {name: after[name] for name in before} == before
    assert cache.has_entry(ID, spec)
    assert cache.has_entry(ID, other)


@pytest.mark.parametrize(
    "maps",
    [np.ones((4, 7, 7), np.float16), np.ones((5, 7, 7), np.float32),
     np.full((5, 7, 7), np.nan, np.float16)],
    ids=["too few", "float32", "NaN"],
)  # fmt: skip
def test_maps_that_do_not_fit_are_never_written(cache, entry, spec, maps):
    with pytest.raises(ValueError, match="finite float16"):
        cache.write(ID, entry.table, spec, maps)
    assert not cache.has_entry(ID, None)


def test_a_cache_of_a_newer_format_is_refused(cache, entry, spec):
    cache.write(ID, entry.table, spec, entry.maps)
    path = Path(cache.url) / "shards" / ID / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["format"] = 99
    del metadata["attributes"]["checksum"]
    path.write_bytes(seal_zarr(json.dumps(metadata).encode(), f"shards/{ID}/zarr.json"))
    with pytest.raises(CacheError, match=r"format 99.*reads format 4"):
        cache.read_table(ID)


def test_a_missing_cache_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no score cache.*precompute_freq\.py"):
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
    with pytest.raises(ValueError, match="give a folder or URL as --cache"):
        ScoreCache("", create=True)


def test_a_cache_travels_to_another_process(cache, entry, spec):
    cache.write(ID, entry.table, spec, entry.maps)
    twin = pickle.loads(pickle.dumps(cache))
    assert twin.read_table(ID).rejected == [Rejected("bad ü", entry.table.rejected[0].reason)]
