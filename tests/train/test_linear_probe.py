import json

import pytest
import torch
from samples import photo_members, score, tar_bytes

from train.linear_probe import LinearProbe, fit, main
from train.pretrain import Pretrain
from train.pretrain import main as pretrain


def _config(tmp_path, **options):
    return LinearProbe(
        checkpoint=tmp_path / "run", cache="", train=[], val=[], device="cpu", **options
    )


def test_a_separable_problem_is_solved(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8) + 6 * torch.eye(3, 8)[labels]
    classifier = fit(features, labels, 3, _config(tmp_path), torch.device("cpu"))
    assert (classifier(features).argmax(1) == labels).float().mean() > 0.99


@pytest.fixture
def run(scored, tmp_path):
    config = Pretrain(
        shards=scored.shards, cache=scored.cache.url, out=tmp_path / "run", model="vit_nano",
        epochs=1, batch_size=8, spec=scored.spec, device="cpu", threads=1,
    )  # fmt: skip
    pretrain(config)
    return config


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_labelled_image_is_probed_once(run, scored, capsys, pool):
    capsys.readouterr()
    accuracy = main(
        LinearProbe(
            checkpoint=run.out, cache=run.cache, train=scored.shards[:2], val=scored.shards[2:],
            pool=pool, epochs=3, batch_size=4, device="cpu",
        )
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == {"train": 17, "val": 9}
    assert report["top1"] == accuracy
    assert 0 <= accuracy <= 1
    assert report["classes"] == 3


def test_images_without_a_class_are_named(run, scored, tmp_path):
    path = tmp_path / "unlabelled.tar"
    path.write_bytes(tar_bytes([m for m in photo_members(3) if m[0].endswith("jpg")]))
    score([path], scored.cache, scored.spec)
    with pytest.raises(ValueError, match=r"unlabelled\.tar:img0000 and 2 more samples"):
        main(
            LinearProbe(
                checkpoint=run.out, cache=run.cache, train=[str(path)], val=scored.shards,
                device="cpu",
            )
        )  # fmt: skip
