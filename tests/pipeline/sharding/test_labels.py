"""Classes from a table beside the images."""

from pathlib import Path

import pytest
from PIL import Image

from famt.pipeline.errors import UserError
from famt.pipeline.sharding.labels import class_names, read_labels
from famt.pipeline.sharding.sources import open_source

TABLES = {
    "file_name,label\na.jpg,cat\nb.jpg,dog\n": {"a.jpg": "cat", "b.jpg": "dog"},
    "id;Class\na;10\nb;9\n": {"a": "10", "b": "9"},
    "a.jpg\tn01\t0\t0\t62\t57\nb.jpg\tn02\t1\t1\t2\t2\n": {"a.jpg": "n01", "b.jpg": "n02"},
    'label, file\ncat, "./a.jpg"\n"dog", "x/b.jpg"\n': {"a.jpg": "cat", "x/b.jpg": "dog"},
    '\ufeffpath,text,label\r\n"x/a.jpg","one, two",cat\r\n': {"x/a.jpg": "cat"},
}


@pytest.mark.parametrize("text", TABLES)
def test_a_table_of_any_usual_kind_is_read(text, tmp_path):
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / "labels.csv") == TABLES[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("photo,score\na,1\n", "has the columns photo, score"),
        ("file,label\na.jpg,\n", "row 2: no image or no class"),
        ("a.jpg,cat\na.jpg,dog\n", "row 2: a.jpg has the class cat too"),
    ],
)
def test_a_table_that_tells_no_classes_is_refused_by_row(text, message, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / "labels.csv")


def test_numbers_are_classes_in_their_own_order():
    assert class_names({"a": "10", "b": "9", "c": "10"}) == ["9", "10"]


@pytest.fixture
def folder(tmp_path):
    for name in ("x/a.jpg", "x/b.jpg", "y/c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def _source(folder: Path, text: str):
    table = folder.parent / "labels.csv"
    table.write_text(text)
    return open_source(str(folder), "train", labels=table)


def test_images_are_found_by_path_name_or_stem_and_the_others_are_said(folder):
    source = _source(folder, "file,label\nx/a.jpg,dog\nc,cat\nelsewhere.jpg,emu\n")
    assert source.classes == ["cat", "dog", "emu"]
    assert {item.name: item.label for item in source.items} == {
        "x/a.jpg": 1, "x/b.jpg": -1, "y/c.png": 0
    }  # fmt: skip
    assert source.unlisted == ["x/b.jpg"]


def test_a_table_of_other_images_is_refused(folder):
    with pytest.raises(UserError, match=r"lists none of the images .*: it lists z.jpg"):
        _source(folder, "z.jpg,cat\n")


def test_a_name_that_two_folders_hold_needs_its_folder(folder):
    Image.new("RGB", (8, 8)).save(folder / "y" / "a.jpg")
    with pytest.raises(UserError, match=r"which of the 2 images a\.jpg .* name them as x/a\.jpg"):
        _source(folder, "a.jpg,cat\nc.png,dog\n")
    assert _source(folder, "x/a.jpg,cat\n").unlisted == ["x/b.jpg", "y/a.jpg", "y/c.png"]
