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


def _put(path, data):
    path.write_bytes(data)
    os.utime(path, (1, 1))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.utime(path, (2, 2)),
        lambda path: path.chmod(0o600),
        lambda path: path.rename(path.with_name("away")).rename(path),
        lambda path: _put(path.with_name("new"), b"x").rename(path),  # as rsync and mv do
        lambda path: _put(path.with_name("new"), b"y").rename(path),
        lambda path: _put(path, b"z"),
        lambda path: _put(path, b"xy"),
    ],
    ids=["touch", "chmod", "rename", "copy", "replace", "rewrite", "append"],
)
def test_a_version_changes_with_any_change_of_the_file(folder, change):
    path = _put(folder / "val-000000.tar", b"x")
    before = storage.version(str(path))
    assert storage.version(str(path)) == before
    change(path)
    assert storage.version(str(path)) != before


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
