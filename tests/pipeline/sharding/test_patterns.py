import os

import pytest

from famt.pipeline.errors import UserError
from famt.pipeline.sharding.patterns import expand_shards


@pytest.fixture
def folder(tmp_path):
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_braces_wildcards_folders_and_files_all_name_shards(folder):
    train = [f"{folder}/train-00000{n}.tar" for n in range(2)]
    assert expand_shards([f"{folder}/train-{{000000..000001}}.tar"]) == train
    assert expand_shards([f"{folder}/train-*.tar"]) == train
    assert expand_shards([train[1], train[0], train[1]]) == [train[1], train[0]]
    assert expand_shards([str(folder)]) == [*train, f"{folder}/val-000000.tar"]
    assert expand_shards([f"file://{folder}/val-*.tar"]) == [f"{folder}/val-000000.tar"]


def test_braces_in_an_object_store_are_expanded_without_asking_it():
    urls = expand_shards(["s3://bucket/a/train-{08..11}.tar"])
    assert urls == [f"s3://bucket/a/train-{n:02d}.tar" for n in range(8, 12)]


@pytest.mark.parametrize("pattern", ["none-*.tar", "val-{000000..000001}.tar", "missing/"])
def test_a_pattern_that_matches_nothing_is_an_error(folder, pattern):
    with pytest.raises(FileNotFoundError, match="no such shards"):
        expand_shards([f"{folder}/{pattern}"])


@pytest.mark.parametrize(
    ("files", "pattern", "remedy"),
    [
        (["a.TAR"], "", r"do not end in \.tar: give '.*/\*\.TAR'"),
        (["n01/a.tar"], "", r"folders hold tars: give '.*/\*/\*\.tar'"),
        (["index.json", "shard.00000.mds"], "", "MDS shards.*webdataset tars"),
        (["a.tar.gz"], "", "compressed: unpack"),
        (["a.tgz"], "", "compressed: unpack"),
        (["a.jpg"], "", r"famt shards --source"),
        (["a.tar"], "a.tar::{folder}/b.tar", "one by one"),
        (["a.tar"], "none-*.tar", "a folder of tars, or a pattern"),
    ],
)
def test_what_can_be_meant_by_a_pattern_without_tars_is_told(tmp_path, files, pattern, remedy):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"no such shards; .*{remedy}"):
        expand_shards([f"{tmp_path}/{pattern.format(folder=tmp_path)}"])


def test_commands_and_compressed_tars_are_no_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="not what a command prints"):
        expand_shards(["pipe:cat a.tar"])
    for name in ("a.tar.gz", "b.tgz", "c.tar.zst"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{name} is compressed: unpack"):
            expand_shards([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a\\b.tar", "a{1,2}.tar", "a{.tar", "a[1].tar", "ä#1 %.tar"])
def test_a_local_path_that_exists_is_taken_as_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert expand_shards([f"{tmp_path}/{name}"]) == [f"{tmp_path}/{name}"]


@pytest.mark.parametrize("name", ["a [x]", "{a,b}", "it's * 'here'", "{"])
def test_the_folder_of_a_pattern_is_taken_as_it_is(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "train-0.tar").write_bytes(b"x")
    for pattern in (f"{folder}/train-*.tar", f"file://{folder}/train-{{0,0}}.tar"):
        assert expand_shards([pattern]) == [f"{folder}/train-0.tar"]


def test_backslashes_outlive_braces(tmp_path):
    for number in range(2):
        (tmp_path / f"a\\{number}.tar").write_bytes(b"x")
    assert expand_shards([f"{tmp_path}/a\\{{0..1}}.tar"]) == [
        f"{tmp_path}/a\\{number}.tar" for number in range(2)
    ]


@pytest.mark.parametrize(
    "name",
    ["a#1.tar", "ä.tar", "a[1].tar", "x#y/a.tar", "a?.tar", "a\n.tar", "a|b.tar", "a%20.tar"],
)
def test_a_url_that_dali_can_not_read_is_refused_with_the_remedy(name):
    with pytest.raises(UserError, match=r"DALI can't read .* rename"):
        expand_shards([f"s3://bucket/{name}"])


def test_a_store_that_dali_does_not_know_is_refused():
    with pytest.raises(UserError, match="DALI reads tars from local paths, s3 and gs alone"):
        expand_shards(["az://container/a.tar"])


def test_a_local_name_that_is_not_utf_8_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.tar"
    with open(path, "wb") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="not UTF-8"):
        expand_shards([str(tmp_path)])


def test_braces_that_do_not_match_are_an_error_that_names_the_pattern():
    with pytest.raises(UserError, match=r"s3://bucket/a\{0\.tar: "):
        expand_shards(["s3://bucket/a{0.tar"])
