import os

import pytest

from famt.pipeline import storage


@pytest.fixture
def folder(tmp_path):
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_relative_path_gets_its_whole_name_and_a_link_keeps_its_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "link.tar").symlink_to(folder / "val-000000.tar")
    assert storage.normalise_url("./link.tar") == f"{folder}/link.tar"
    assert storage.read("link.tar") == b"x"


def test_a_version_changes_with_size_or_time(folder):
    path = folder / "val-000000.tar"
    before = storage.version(str(path))
    assert storage.version(str(path)) == before
    os.utime(path, (1, 1))
    touched = storage.version(str(path))
    assert touched != before
    path.write_bytes(b"xy")
    os.utime(path, (1, 1))
    assert storage.version(str(path)) != touched


def test_a_file_replaced_at_equal_size_and_time_has_another_version(folder):
    """By rename, as rsync and mv do, and in place."""
    path = folder / "val-000000.tar"
    os.utime(path, (1, 1))
    seen = {storage.version(str(path))}
    (folder / "new").write_bytes(b"y")
    os.utime(folder / "new", (1, 1))
    (folder / "new").rename(path)
    seen.add(storage.version(str(path)))
    path.write_bytes(b"z")
    os.utime(path, (1, 1))
    seen.add(storage.version(str(path)))
    assert len(seen) == 3


def test_versions_of_many_files_are_those_of_each_that_is_there(folder, tmp_path):
    for n in range(100):
        (tmp_path / f"{n}.tar").write_bytes(bytes(n))
    urls = [str(tmp_path / f"{n}.tar") for n in range(100)]
    asked = [*urls, str(tmp_path / "none.tar"), str(folder / "val-000000.tar"), "/none/none.tar"]
    there = [*urls, str(folder / "val-000000.tar")]
    assert storage.versions(asked) == {url: storage.version(url) for url in there}
    assert storage.versions([]) == {}


@pytest.mark.parametrize("url", ["/a.tar", "/data/a.tar", "s3://bucket/a.tar", "s3://b/c/a.tar"])
def test_a_folder_and_a_name_make_the_url_that_they_came_from(url):
    folder, name = storage.split_url(url)
    assert storage.join_url(folder, name) == url
    assert folder == storage.normalise_url(folder)


def test_a_name_is_listed_whatever_is_behind_it(folder):
    (folder / "link.tar").symlink_to(folder / "nowhere")
    (folder / "odd.tar#1").touch()
    assert {"link.tar", "odd.tar#1", "notes.txt"} <= storage.list_names(str(folder))
    with pytest.raises(OSError, match="none can't be listed"):
        storage.list_names(str(folder / "none"))


def test_reading_and_existence(folder):
    assert storage.read(f"{folder}/notes.txt") == b"x"
    assert storage.exists(f"{folder}/notes.txt")
    assert not storage.exists(f"{folder}/other.txt")
