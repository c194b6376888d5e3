import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.writer import check_dataset, open_source, safe_key


def test_keys_hold_letters_digits_dashes_and_underscores():
    assert safe_key("a b/ü.x y.jpg") == "a_b___x_y"


@given(st.text(min_size=1))
def test_any_name_becomes_a_key_that_dali_reads(name):
    assert set(safe_key(name)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
    )


def test_an_unknown_source_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar10"):
        open_source(str(tmp_path / "none"), "train")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images"):
        open_source(str(tmp_path / "empty"), "train")


def test_a_folder_gives_its_classes_and_images_in_order(tmp_path):
    for name in ("b/2.jpg", "a/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    classes, items = open_source(str(tmp_path), "train")
    assert classes == ["a", "b"]
    assert [(item.name, item.label) for item in items] == [("a/1.png", 0), ("b/2.jpg", 1)]
    assert items[1].load() == tmp_path / "b/2.jpg"


def test_a_new_folder_has_no_splits_yet(tmp_path):
    assert check_dataset(str(tmp_path / "new"), ["a"]) == {"classes": ["a"], "splits": {}}
