import asyncio
import json

import numpy as np
import pytest
import zarr

from famt.pipeline.arrays import CheckedStore, maps_objects, read_array, remedy, table_objects
from famt.pipeline.errors import CacheError
from famt.pipeline.objects import Objects
from famt.pipeline.scores import ScoreSpec

ENTRY = f"shards/{'a' * 32}"


@pytest.fixture
def objects(tmp_path):
    return Objects(str(tmp_path / "cache"), create=True)


def _put(objects, parts):
    for name, data in parts:
        objects.put(name, data)


def _read(objects, name):
    store = CheckedStore(objects.zarr(), objects.url)
    return asyncio.run(read_array(store, f"{ENTRY}/{name}"))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_arrays_come_back_in_one_chunk_each(objects, count):
    spec, rng = ScoreSpec(grid=3), np.random.default_rng(0)
    samples = rng.integers(1, 1 << 40, (count, 3))
    keys = [f"ü {n}" for n in range(count)]
    maps = rng.random((count, 3, 3)).astype(np.float16)
    _put(objects, table_objects(ENTRY, {"kept": count}, samples, keys))
    _put(objects, maps_objects(ENTRY, spec, maps))
    np.testing.assert_array_equal(_read(objects, "samples"), samples)
    assert list(_read(objects, "key")) == keys
    np.testing.assert_array_equal(_read(objects, spec.id), maps)
    chunks = [each for each in objects.below(ENTRY) if not each.path.endswith("zarr.json")]
    assert len(chunks) == (3 if count else 0)


def test_any_zarr_reader_can_open_an_entry(objects):
    spec = ScoreSpec(grid=3)
    maps = np.ones((2, 3, 3), np.float16)
    _put(objects, table_objects(ENTRY, {"kept": 2}, np.ones((2, 3), np.int64), ["a", "b"]))
    _put(objects, maps_objects(ENTRY, spec, maps))
    group = zarr.open_group(f"{objects.url}/{ENTRY}", mode="r")
    np.testing.assert_array_equal(group[spec.id][:], maps)
    assert list(group["key"][:]) == ["a", "b"]


def test_the_last_object_completes_the_others():
    spec = ScoreSpec(grid=3)
    table = [
        path.removeprefix(f"{ENTRY}/")
        for path, _ in table_objects(ENTRY, {}, np.ones((1, 3), np.int64), ["a"])
    ]
    assert table[-1] == "zarr.json"
    assert sorted(table[:2]) == ["key/c/0", "samples/c/0/0"]
    maps = [
        path.removeprefix(f"{ENTRY}/")
        for path, _ in maps_objects(ENTRY, spec, np.ones((1, 3, 3), np.float16))
    ]
    assert maps == [f"{spec.id}/c/0/0/0", f"{spec.id}/zarr.json"]


def test_equal_content_gives_equal_bytes():
    spec, maps = ScoreSpec(grid=3), np.ones((1, 3, 3), np.float16)
    assert dict(maps_objects(ENTRY, spec, maps)) == dict(maps_objects(ENTRY, spec, maps))


def test_metadata_that_was_changed_is_refused_before_zarr_believes_it(objects):
    _put(objects, table_objects(ENTRY, {}, np.ones((4, 3), np.int64), list("abcd")))
    path = f"{ENTRY}/samples/zarr.json"
    metadata = json.loads(objects.get(path))
    metadata["shape"] = [3, 3]
    objects.put(path, json.dumps(metadata).encode())
    with pytest.raises(CacheError, match=r"samples/zarr\.json is damaged \(its checksum"):
        _read(objects, "samples")


def test_the_remedy_spares_what_is_whole():
    assert "Remove /c/shards/x and run" in remedy("/c", "shards/x/samples/c/0/0")
    assert "Remove /c/shards/x and run" in remedy("/c", "shards/x/zarr.json")
    assert "Remove /c/shards/x/low-1 and" in remedy("/c", "shards/x/low-1/c/0/0/0")
