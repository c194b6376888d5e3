import json

import pytest
import torch
from samples import photo_members, score, tar_bytes

from famt.pipeline.errors import UserError
from famt.train.evaluate.evaluators import EVALUATORS
from famt.train.evaluate.evaluators.knn import Knn
from famt.train.evaluate.run import run

pytestmark = pytest.mark.usefixtures("trained")


@pytest.fixture
def shards(scored, tmp_path):
    """Makes a tar in a folder of its own, of images that no other holds."""

    def make(name, labels, first, classes=()):
        folder = tmp_path / name
        folder.mkdir()
        members = photo_members(len(labels), first)
        for n, label in enumerate(labels):
            members[2 * n + 1] = (f"img{first + n:04d}.cls", str(label).encode())
        (folder / f"{name}-000000.tar").write_bytes(tar_bytes(members))
        if classes:
            told = {"classes": classes, "splits": {name: {"shards": [f"{name}-000000.tar"]}}}
            (folder / "dataset.json").write_text(json.dumps(told))
        score([folder / f"{name}-000000.tar"], scored.cache, scored.spec)
        return [str(folder / f"{name}-000000.tar")]

    return make


def test_images_that_are_in_both_sets_are_refused_whatever_the_name_of_their_tar(
    options, scored, tmp_path
):
    again = tmp_path / "other-name.tar"
    again.write_bytes((scored.folder / "train-000001.tar").read_bytes())
    for val in (scored.shards[:2], [str(again)]):
        with pytest.raises(UserError, match=r"--train and .*\.tar of --val hold the same images"):
            run(options(Knn, val=val))


def test_classes_of_other_names_are_refused(options, shards):
    train = shards("train", [0, 1, 0, 1], 100, ["cat", "dog"])
    renamed = shards("renamed", [0, 1], 200, ["cat", "wolf"])
    with pytest.raises(UserError, match=r"class 1 is 'dog' in .*train/dataset\.json and 'wolf'"):
        run(options(Knn, train=train, val=renamed))
    fewer = shards("fewer", [0, 0], 300, ["cat"])
    assert run(options(Knn, train=train, val=fewer))


def test_a_description_by_somebody_else_is_passed_over(options, scored):
    (scored.folder / "dataset.json").write_text('{"splits": {"train": 3}, "classes": 10}')
    assert run(options(Knn))


@pytest.mark.parametrize("name", ["knn", "probe"])
def test_classes_that_nothing_was_learned_of_are_said_or_refused(options, shards, name, capsys):
    kind = EVALUATORS[name]
    train = shards("train", [0, 1] * 10, 100)
    run(options(kind, train=train, val=shards("more", [0, 1, 2, 5, 5], 200)))
    said = capsys.readouterr().err
    assert "2 of the 4 classes of --val (2, 5) are missing in --train" in said
    with pytest.raises(UserError, match=r"--val shares no class with --train"):
        run(options(kind, train=train, val=shards("others", [2, 3], 300)))
    with pytest.raises(UserError, match=r"\.tar:img0400 and all other .* have class 1"):
        run(options(kind, train=shards("one", [1, 1, 1], 400), val=train))


@pytest.mark.parametrize("label", ["-1", "cat"])
def test_images_that_a_label_kept_out_are_counted_and_one_is_named(options, shards, label, capsys):
    train = shards("train", [0, 1, label, 1, label], 100)
    run(options(Knn, train=train, val=shards("val", [0, 1], 200)))
    said = capsys.readouterr().err
    assert f"2 images of --train left out, {train[0]}:img0102.jpg:" in said
    assert label in said
    assert "--val" not in said


def test_what_was_found_names_its_data_and_is_printed_as_one_reads_it(options, shards, capsys):
    train = shards("train", [0, 1] * 4, 100)
    first, second = shards("first", [0, 1] * 3, 200), shards("second", [0, 1] * 3, 300)
    capsys.readouterr()
    lines = []
    for val in (first, second, first):
        torch.manual_seed(0)
        run(options(Knn, train=train, val=val, json=True))
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0] == lines[2]
    assert lines[0]["val_data"] != lines[1]["val_data"]
    assert lines[0]["train_data"] == lines[1]["train_data"]
    for value in lines[0].values():
        if isinstance(value, float):
            assert len(f"{value}".strip("0.")) <= 6
