"""Features on disk: the right ones, under the right keys, in order."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from samples import photo_members, score, tar_bytes

from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import CentreView, LoaderConfig
from famt.train import checkpoint, embed
from famt.train.embed import main
from famt.train.program_options import Embed


def _embed(run, scored, out, **options):
    known = {"shards": scored.shards, "batch_size": 4, "device": "cpu", "threads": 1}
    main(Embed(checkpoint=str(run), cache=scored.cache.url, out=out, **(known | options)))


@pytest.fixture
def expected(tiny_run, scored):
    """Key -> class token and mean of patches, image by image."""
    encoder = checkpoint.load_model(tiny_run).encoder
    table = load_samples(scored.shards, scored.cache)
    config = LoaderConfig(
        batch_size=1, image_size=48, view=CentreView(1.0), shuffle_buffer=0, threads=1
    )
    found = {}
    with torch.no_grad():
        for crops in CropLoader(table, config, drop_last=False):
            pixels = crops.images.float() / 255 - torch.tensor([0.485, 0.456, 0.406])
            pixels = (pixels / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
            tokens = encoder.forward_features(pixels)[0]
            found[table.key(int(crops.rows[0]))] = (tokens[0].numpy(), tokens[1:].mean(0).numpy())
    return found


@pytest.mark.parametrize("row_group", [3, 4096])
def test_parquet_holds_every_image_in_the_order_of_the_shards(
    tiny_run, scored, tmp_path, expected, row_group, monkeypatch
):
    monkeypatch.setattr(embed, "_ROW_GROUP", row_group)
    _embed(tiny_run, scored, tmp_path / "f.parquet")
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"img{n:04d}" for n in range(26)]
    assert [row["shard"] for row in rows] == [
        shard for shard, count in zip(scored.shards, (10, 7, 9), strict=True) for _ in range(count)
    ]
    assert [row["label"] for row in rows] == [n % 3 for n in range(26)]
    for row in rows:
        cls, mean = expected[f"{row['shard']}:{row['key']}"]
        np.testing.assert_allclose(row["cls"], cls, atol=1e-4)
        np.testing.assert_allclose(row["mean"], mean, atol=1e-4)


def test_a_folder_of_arrays_holds_the_same(tiny_run, scored, tmp_path, expected):
    _embed(tiny_run, scored, tmp_path / "new" / "features")
    folder = tmp_path / "new" / "features"
    keys = (folder / "keys.txt").read_text().splitlines()
    assert keys == list(expected)
    assert np.load(folder / "labels.npy").tolist() == [n % 3 for n in range(26)]
    for name, which in (("cls", 0), ("mean", 1)):
        array = np.load(folder / f"{name}.npy")
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, [expected[key][which] for key in keys], atol=1e-4)


def test_images_without_a_class_are_welcome(tiny_run, scored, tmp_path):
    """And one that can't be decoded is left out, its neighbours keep their keys."""
    path = tmp_path / "shards" / "mixed.tar"
    members = [each for each in photo_members(4) if not each[0].endswith(".cls")]
    members[1] = ("img0001.jpg", b"no image")
    members.append(("img0003.cls", b"8"))
    path.write_bytes(tar_bytes(members))
    score([path], scored.cache, scored.spec)
    _embed(tiny_run, scored, tmp_path / "f.parquet", shards=[str(path)])
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["key"].to_pylist() == ["img0000", "img0002", "img0003"]
    assert table["label"].to_pylist() == [None, None, 8]


def test_averaged_weights_on_request(tiny_run, scored, tmp_path):
    for name, ema in (("raw", False), ("average", True)):
        _embed(tiny_run, scored, tmp_path / name, ema=ema)
    raw, average = (np.load(tmp_path / name / "cls.npy") for name in ("raw", "average"))
    assert not np.allclose(raw, average)


def test_a_killed_run_leaves_nothing_under_the_name(tiny_run, scored, tmp_path, monkeypatch):
    real = embed._features

    def dies(*args):
        yield next(iter(real(*args)))
        raise OSError("the disk is full")

    for out in (tmp_path / "f.parquet", tmp_path / "folder"):
        with monkeypatch.context() as patched:
            patched.setattr(embed, "_features", dies)
            with pytest.raises(OSError, match="full"):
                _embed(tiny_run, scored, out)
        assert not out.exists()
        _embed(tiny_run, scored, out)  # what it left behind is in nobody's way
        assert out.exists()
        with pytest.raises(UserError, match="exists already"):
            _embed(tiny_run, scored, out)


def test_several_processes_are_refused(tiny_run, scored, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        _embed(tiny_run, scored, tmp_path / "f.parquet")
