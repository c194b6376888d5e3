from pathlib import Path

import pytest

from famt.pipeline.errors import CacheError
from famt.pipeline.objects import Objects, is_run, is_shard_id, is_spec_id

ID = "0123abcd" * 4
OWN = [
    f"shards/{ID}/zarr.json",
    f"shards/{ID}/samples/zarr.json",
    f"shards/{ID}/samples/c/0/0",
    f"shards/{ID}/key/c/0",
    f"shards/{ID}/border_geodesic-0123456789ab/c/0/0/0",
    f"shards/{ID}/generation-famt-0123456789ab/zarr.json",
    "datasets/train-0123456789ab/00000001.json",
    "generations/run-1/00000100.json",
    "generations/run-1/123456789.json",
    "generations/run-1/needed-by-run-2",
    f"notices/{ID}.json",
    f"claims/{ID}.json",
]
FOREIGN = [
    "zarr.json",
    f"shards/{ID}.tar",
    f"shards/{ID[:-1]}/zarr.json",
    f"shards/{ID}/zarr.json.bak",
    f"shards/{ID}/photos/zarr.json",
    f"shards/{ID}/samples/c/0/1",
    f"shards/{ID}/../zarr.json",
    "datasets/train/00000001.json",
    "datasets/train-0123456789ab/1.json",
    "generations/../00000001.json",
    "generations/run-1/model.json",
    "notices/mine.json",
    f"other/shards/{ID}/zarr.json",
]


@pytest.fixture
def objects(tmp_path):
    return Objects(str(tmp_path / "cache"), create=True)


def _lay(objects, names):
    for name in names:
        path = Path(objects.url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_objects_come_back_are_listed_and_deleted(objects):
    for path in OWN:
        objects.put(path, path.encode())
    assert [objects.get(path) for path in OWN] == [path.encode() for path in OWN]
    found = [
        each.path
        for folder in ("shards", "datasets", "generations", "notices", "claims")
        for each in objects.below(folder)
    ]
    assert sorted(found) == sorted(OWN)
    assert objects.children("shards") == [ID]
    objects.refuse_foreign()
    objects.delete(OWN)
    objects.delete(OWN)  # someone else was faster
    assert not any(objects.exists(path) for path in OWN)


@pytest.mark.parametrize("path", FOREIGN)
def test_a_foreign_name_is_neither_put_listed_nor_deleted(objects, path):
    with pytest.raises(ValueError, match="no name for an object"):
        objects.put(path, b"x")
    _lay(objects, [path] if ".." not in path else [])
    assert list(objects.below(path.split("/")[0])) == []
    with pytest.raises(ValueError, match="not deleted"):
        objects.delete([OWN[0], path])


@pytest.mark.parametrize("name", ["shards/a.tar", "datasets/x/y", "generations/.DS_Store/z"])
def test_foreign_names_in_the_roots_folders_are_refused(objects, name):
    _lay(objects, [*OWN, name])
    with pytest.raises(CacheError, match="is no part of a score cache"):
        objects.refuse_foreign()


def test_staging_files_are_those_of_names_that_the_cache_gives(objects):
    own = [f"{path}#{number}" for number, path in enumerate(OWN)]
    _lay(objects, [*OWN, *own, "a.tar#1", f"shards/{ID}/a#1", f"shards/{ID}/zarr.json#1x"])
    found = list(objects.staging_files())
    assert sorted(each.path for each in found) == sorted(own)
    for each in found:
        objects.delete_staging(each)
    assert list(objects.staging_files()) == []


def test_ids_of_the_known_shapes():
    assert is_shard_id(ID)
    assert not is_shard_id(ID.upper())
    assert is_spec_id("lowpass-0123456789ab")
    assert not is_spec_id("samples")
    assert is_run("run-0123")
    assert not is_run("../x")
