from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from famt.pipeline.caching.cache_store import CacheStore
from famt.pipeline.errors import CacheError

ID = "0123abcd" * 4
TABLE, MAPS = f"shards/{ID}/table.zip", f"shards/{ID}/border_geodesic-0123456789ab.zip"
JSON = "datasets/train-0123456789ab/00000001.json"
OWN = [TABLE, MAPS, JSON]
FOREIGN = [
    "zarr.json",
    f"shards/{ID}.tar",
    f"shards/{ID[:-1]}/table.zip",
    f"shards/{ID}/zarr.json",
    f"shards/{ID}/photos.zip",
    f"shards/{ID}/table.zip.bak",
    f"shards/{ID}/deep/table.zip",
    f"shards/{ID}/../table.zip",
    "datasets/train/00000001.json",
    "datasets/train-0123456789ab/1.json",
    f"other/shards/{ID}/table.zip",
]
ARRAYS = {
    "numbers": np.arange(6).reshape(2, 3),
    "halves": np.array([0.5, 65504], np.float16),
    "names": np.array(["ü", "", "a/b"], dtype=np.dtypes.StringDType()),
    "none": np.empty((0, 3, 3), np.float16),
    "nobody": np.array([], dtype=np.dtypes.StringDType()),
}
ATTRIBUTES = {"x": [0.25, None, True], "y": {"b": "ü"}}


@pytest.fixture
def store(tmp_path):
    return CacheStore(str(tmp_path / "cache"), create=True)


def _lay(store, names):
    for name in names:
        path = Path(store.url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_group_comes_back_and_any_zarr_reader_can_open_it(store):
    store.put_group(TABLE, ATTRIBUTES, ARRAYS)
    group = store.get_group(TABLE)
    opened = zarr.open(ZipStore(f"{store.url}/{TABLE}", mode="r"), mode="r")
    assert group.attributes == opened.attrs.asdict() == ATTRIBUTES
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(opened[name][:], array)
        if array.dtype.kind == "T":
            assert group.strings(name) == array.tolist()
        else:
            read = group.numbers(name, array.dtype.type, *array.shape[1:])
            np.testing.assert_array_equal(read, array)
            assert (read.shape, read.dtype) == (array.shape, array.dtype)


def test_equal_groups_are_equal_bytes(store):
    store.put_group(TABLE, ATTRIBUTES, ARRAYS)
    first = store.get(TABLE)
    store.put_group(TABLE, ATTRIBUTES, ARRAYS)
    assert store.get(TABLE) == first


def test_json_comes_back_and_is_put_once(store):
    store.put_json(JSON, ATTRIBUTES)
    assert store.get_json(JSON).items() >= ATTRIBUTES.items()
    with pytest.raises(Exception, match="already exists"):
        store.put_json(JSON, {})


def _readers(store):
    store.put_json(JSON, ATTRIBUTES)
    store.put_group(MAPS, ATTRIBUTES, ARRAYS)
    return {JSON: store.get_json, MAPS: store.get_group}


@pytest.mark.parametrize("path", [JSON, MAPS])
def test_no_flipped_bit_and_no_other_length_is_ever_believed(store, path):
    read = _readers(store)[path]
    data = store.get(path)
    versions = [b"", b"{}", b"0" * 32, data[1:], data[:-1], data + b"x", data[: len(data) // 2]]
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        versions.append(bytes(flipped))
    for version in versions:
        Path(store.url, path).write_bytes(version)
        with pytest.raises(CacheError, match=rf"{path} is damaged .*Remove .*famt score"):
            read(path)


@pytest.mark.parametrize(
    ("path", "other"),
    [(JSON, JSON.replace("01.", "02.")), (MAPS, MAPS.replace(ID, "f" * 32)), (MAPS, TABLE)],
)
def test_an_object_in_anothers_place_is_refused(store, path, other):
    read = _readers(store)[path]
    _lay(store, [other])
    Path(store.url, other).write_bytes(store.get(path))
    with pytest.raises(CacheError, match=rf"{other} is damaged .*is another object"):
        read(other)


def test_objects_are_listed_and_deleted(store):
    for path in OWN:
        store.put(path, path.encode())
    assert [store.get(path) for path in OWN] == [path.encode() for path in OWN]
    found = [each.path for folder in ("shards", "datasets") for each in store.below(folder)]
    assert sorted(found) == sorted(OWN)
    store.refuse_foreign()
    store.delete(OWN)
    store.delete(OWN)  # someone else was faster
    assert not any(store.exists(path) for path in OWN)


@pytest.mark.parametrize("path", FOREIGN)
def test_a_foreign_name_is_neither_put_listed_nor_deleted(store, path):
    with pytest.raises(ValueError, match="no name for an object"):
        store.put(path, b"x")
    _lay(store, [path] if ".." not in path else [])
    assert list(store.below(path.split("/")[0])) == []
    with pytest.raises(ValueError, match="not deleted"):
        store.delete([TABLE, path])


@pytest.mark.parametrize("name", ["shards/a.tar", "datasets/x/y"])
def test_foreign_names_in_the_roots_folders_are_refused(store, name):
    _lay(store, [*OWN, name])
    with pytest.raises(CacheError, match="is no part of a score cache"):
        store.refuse_foreign()


def test_staging_files_are_those_of_names_that_the_cache_gives(store):
    own = [f"{path}#{number}" for number, path in enumerate(OWN)]
    _lay(store, [*OWN, *own, "a.tar#1", f"shards/{ID}/a#1", f"shards/{ID}/table.zip#1x"])
    found = list(store.staging_files())
    assert sorted(each.path for each in found) == sorted(own)
    store.delete(each.path for each in found)
    assert list(store.staging_files()) == []
