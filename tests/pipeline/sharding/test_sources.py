import hashlib
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from famt.pipeline.sharding.sources import open_source


def test_an_unknown_source_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar10"):
        open_source(str(tmp_path / "none"), "train")


def test_a_folder_gives_its_classes_and_images_in_order(tmp_path):
    for name in ("b/2.jpg", "a/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "moves.GIF").write_bytes(b"x")
    classes, items, passed_over, _ = open_source(str(tmp_path), "train")
    assert classes == ["a", "b"]
    assert [(item.name, item.label) for item in items] == [("a/1.png", 0), ("b/2.jpg", 1)]
    assert items[1].load() == tmp_path / "b/2.jpg"
    assert passed_over == {".gif": 1}


def test_a_torchvision_data_set_is_read_by_name(tmp_path, monkeypatch):
    """CIFAR-10's own files, three images each, under checksums of their own."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    contents = {
        "data_batch_1": {"data": pixels, "labels": [2, 0, 1]},
        "test_batch": {"data": pixels[::-1], "labels": [1, 0, 2]},
        "batches.meta": {"label_names": ["plane", "car", "bird"]},
    }
    sums = {}
    for name, content in contents.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    for attribute, name in (("train_list", "data_batch_1"), ("test_list", "test_batch")):
        monkeypatch.setattr(CIFAR10, attribute, [[name, sums[name]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    for split, expected, labels in (("train", pixels, [2, 0, 1]), ("val", pixels[::-1], [1, 0, 2])):
        classes, items, *_ = open_source("cifar10", split, str(tmp_path))
        assert classes == ["plane", "car", "bird"]
        assert [item.label for item in items] == labels
        for item, row in zip(items, expected, strict=True):
            assert (np.array(item.load()) == row.reshape(3, 32, 32).transpose(1, 2, 0)).all()
