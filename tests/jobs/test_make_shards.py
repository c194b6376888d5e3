import errno
import io
import json
from unittest.mock import Mock

import numpy as np
import pytest
import webdataset
from launch import run
from PIL import Image
from samples import encode, photo

from famt.jobs.make_shards import main
from famt.jobs.options import MakeShards
from famt.pipeline.errors import UserError
from famt.pipeline.options import Encoding
from famt.pipeline.scoring.decode import decode


@pytest.fixture
def folder(tmp_path):
    for n in range(12):
        path = tmp_path / "photos" / f"class {n % 3}" / f"my.photo {n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(n)))
    return tmp_path / "photos"


def _read(shards):
    urls = [str(each) for each in sorted(shards)]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


@pytest.fixture
def make(tmp_path):
    """Make shards, which must end with a code; gives their samples."""

    def shards(source, code=0, out="o", **options):
        assert main(MakeShards(source=str(source), out=str(tmp_path / out), **options)) == code
        return _read((tmp_path / out).glob("*.tar"))

    return shards


def test_every_image_is_in_the_shards_once_as_it_was(make, folder, tmp_path):
    out = tmp_path / "o"
    samples = make(folder, samples_per_shard=5)
    assert sorted(s.name for s in out.glob("*.tar")) == [f"train-{n:06d}.tar" for n in range(3)]
    assert {s["jpg"] for s in samples} == {p.read_bytes() for p in folder.rglob("*.jpg")}
    for sample in samples:
        number = int(sample["__key__"].split("_")[-1])
        assert int(sample["cls"]) == number % 3
        assert sample["jpg"] == encode(photo(number))
        assert not set(sample["__key__"]) & set(". /")
    described = json.loads((out / "dataset.json").read_text())
    assert described["classes"] == ["class 0", "class 1", "class 2"]
    assert described["splits"]["train"]["samples"] == 12
    assert described["splits"]["train"]["seed"] == 0
    assert [s["__key__"] for s in samples] != sorted(s["__key__"] for s in samples)


def test_a_seed_repeats_to_the_byte_and_another_does_not(make, folder, tmp_path):
    tars = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(folder, out=name, seed=seed)
        tars.append((tmp_path / name / "train-000000.tar").read_bytes())
    assert tars[0] == tars[1]
    assert tars[0] != tars[2]


def test_a_holdout_parts_the_images(make, folder, tmp_path):
    make(folder, holdout=0.25)
    train, val = (_read((tmp_path / "o").glob(f"{s}-*.tar")) for s in ("train", "val"))
    assert (len(train), len(val)) == (9, 3)
    assert not {s["jpg"] for s in train} & {s["jpg"] for s in val}


def test_a_holdout_of_the_split_val_is_refused(make, folder):
    with pytest.raises(UserError, match="another --split"):
        make(folder, split="val", holdout=0.25)


def test_other_classes_in_one_folder_are_refused_before_anything_is_written(make, folder, tmp_path):
    make(folder)
    (folder / "class 9").mkdir()
    (folder / "class 9" / "x.jpg").write_bytes(encode(photo(0)))
    with pytest.raises(UserError, match="other classes"):
        make(folder, split="more")
    assert not list((tmp_path / "o").glob("more-*"))


def test_re_encoding_shrinks_the_longer_side(make, folder):
    options = Encoding(max_side=24)
    for sample in make(folder, encoding=options):
        assert Image.open(io.BytesIO(sample["jpg"])).size == (24, 20)


def test_other_formats_are_stored_without_loss(make, tmp_path):
    path = tmp_path / "photos" / "a" / "x.bmp"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(photo(0), "BMP"))
    (sample,) = make(tmp_path / "photos")
    assert (np.array(Image.open(io.BytesIO(sample["png"]))) == photo(0)).all()


@pytest.mark.parametrize("ending", ["tiff", "png"])
def test_16_bit_grey_is_scaled_by_its_range(make, tmp_path, capsys, ending):
    folder = tmp_path / "scans"
    folder.mkdir()
    values = np.linspace(0, 65535, 24 * 24).reshape(24, 24).round().astype(np.uint16)
    Image.fromarray(values).save(folder / f"bright.{ending}")
    Image.fromarray(values // 17).save(folder / f"dark.{ending}")
    (sample,) = make(folder, code=1)
    expected = np.round(values / 65535 * 255)
    pixels = decode(sample["png"], 24)
    assert abs(pixels - expected[..., None]).max() <= 0.5 + 1e-9
    told = capsys.readouterr().err
    assert f"skipped dark.{ending}" in told
    assert "end at 3855 of 65535 and would be almost black; scale them" in told


def test_pixels_without_a_known_range_are_refused_with_the_remedy(make, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tiff")
    make(folder, code=1)
    assert "F pixels have no known range; scale them to 16 bits" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_of_a_transparent_image_the_colours_count(make, tmp_path, capsys, ending):
    folder = tmp_path / "cut"
    folder.mkdir()
    alpha = np.zeros((40, 48, 1), np.uint8)
    Image.fromarray(np.concatenate([photo(0), alpha], axis=2)).save(folder / f"x.{ending}")
    (sample,) = make(folder)
    pixels = decode(sample["png"], 8)
    expected = Image.fromarray(photo(0)).resize((8, 8), Image.Resampling.BOX)
    assert (pixels == np.asarray(expected)).all()
    assert "train: transparent: 1 image; their colours are used" in capsys.readouterr().err


def test_what_cannot_be_read_is_skipped_reported_and_fails_the_job(make, folder, tmp_path, capsys):
    (folder / "class 0" / "broken.bmp").write_bytes(b"BM broken")
    make(folder, code=1)
    assert "skipped class 0/broken.bmp" in capsys.readouterr().err
    described = json.loads((tmp_path / "o" / "dataset.json").read_text())
    assert described["splits"]["train"]["samples"] == 12
    assert described["splits"]["train"]["skipped"][0][0] == "class 0/broken.bmp"


def test_shards_are_never_written_over(make, folder):
    make(folder)
    with pytest.raises(FileExistsError, match="has train shards already"):
        make(folder)


def test_a_full_tmpdir_is_named_with_the_remedy(make, folder, monkeypatch):
    monkeypatch.setattr("tarfile.TarFile.addfile", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"no room in .*famt-shards-.*: set TMPDIR"):
        make(folder)


@pytest.fixture
def masked(tmp_path):
    """Five photos beside masks; the one named 3 is upright only by its EXIF orientation."""
    (tmp_path / "source" / "images").mkdir(parents=True)
    (tmp_path / "source" / "masks").mkdir()
    for n in range(5):
        image = Image.fromarray(photo(n))
        exif = Image.Exif()
        if n == 3:
            exif[0x0112] = 6
        image.save(tmp_path / "source" / "images" / f"{n}.jpg", exif=exif)
        size = {3: (48, 40), 4: (61, 73)}.get(n, (40, 48))  # number 4 is finer than its image
        mask = np.zeros(size, np.uint8)
        mask[:10] = n
        Image.fromarray(mask).save(tmp_path / "source" / "masks" / f"{n}.png")
    return tmp_path / "source"


def test_masks_go_into_the_shards_beside_their_images(make, masked, capsys):
    samples = make(masked)
    assert len(samples) == 5
    assert "train: 5 images with masks in 1 shard" in capsys.readouterr().out
    for sample in samples:
        name = sample["__key__"].split("-")[1]
        assert sample["jpg"] == (masked / "images" / f"{name}.jpg").read_bytes()
        assert sample["mask.png"] == (masked / "masks" / f"{name}.png").read_bytes()
        assert "cls" not in sample


def test_white_of_black_and_white_masks_becomes_class_1(make, masked):
    for path in (masked / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(((mask > 0) * 255).astype(np.uint8)).save(path)
    found = [np.array(Image.open(io.BytesIO(each["mask.png"]))) for each in make(masked)]
    assert sorted(int(mask.max()) for mask in found) == [0, 1, 1, 1, 1]


def test_an_image_without_its_mask_or_with_another_ones_is_told(make, masked, capsys):
    Image.fromarray(np.ones((40, 48), np.uint8)).save(masked / "masks" / "3.png")
    make(masked, code=1)
    assert "mask 3.png of 48 x 40 px has not the shape" in capsys.readouterr().err
    (masked / "masks" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.jpg has no mask"):
        make(masked, out="p")


def test_the_digits_come_with_scikit_learn(make):
    samples = make("digits", samples_per_shard=2000)
    assert len(samples) == 1797
    assert Image.open(io.BytesIO(samples[0]["png"])).size == (32, 32)


def test_the_script_runs_by_its_path():
    assert "--samples-per-shard" in run("jobs/make_shards.py", "--help").stdout


def _scatter(root, *places):
    """Photos at those places below a folder, the n-th one `photo(n)`."""
    for n, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(encode(photo(n)))
    return root


def _labels(samples):
    return [sample.get("cls") for sample in samples]


def test_a_flat_folder_has_no_classes(make, tmp_path, capsys):
    photos = _scatter(tmp_path / "photos", "b.jpg", "a 1.JPG", "c.png")
    (photos / "notes.txt").write_text("no image")
    (photos / "._b.jpg").write_bytes(b"what macOS leaves beside a file")
    samples = make(photos)
    assert [sample.get("cls") for sample in samples] == [None, None, None]
    assert {s["__key__"].split("-")[-1] for s in samples} == {"a_1", "b", "c"}
    assert json.loads((tmp_path / "o" / "dataset.json").read_text())["classes"] == []
    out, err = capsys.readouterr()
    assert "3 images without classes" in out
    assert "ignored files that are no images: 1 .txt" in err


def test_images_beside_folders_mean_that_folders_are_no_classes(make, tmp_path):
    photos = _scatter(tmp_path / "photos", "x.jpg", "2021/03/x.jpg", "2022/x.jpg")
    samples = make(photos)
    assert _labels(samples) == [None] * 3
    assert {sample["jpg"] for sample in samples} == {encode(photo(n)) for n in range(3)}


def test_nested_folders_are_no_classes_if_the_user_says_so(make, tmp_path):
    photos = _scatter(tmp_path / "photos", "2021/03/x.jpg", "2021/04/y.jpg", "2022/z.jpg")
    assert sorted(_labels(make(photos, out="a"))) == [b"0", b"0", b"1"]
    assert _labels(make(photos, out="b", unlabelled=True)) == [None] * 3


def test_a_table_of_labels_among_the_images_is_no_ignored_file(make, tmp_path, capsys):
    photos = _scatter(tmp_path / "photos", "x.jpg", "y.jpg")
    table = photos / "labels.csv"
    table.write_text("file_name,label\nx.jpg,cat\ny.jpg,dog\n")
    (photos / "notes.md").symlink_to("nowhere")
    assert sorted(_labels(make(photos, labels=table))) == [b"0", b"1"]
    assert "ignored files that are no images: 1 .md\n" in capsys.readouterr().err


def test_an_empty_class_keeps_its_number(make, tmp_path):
    photos = _scatter(tmp_path / "photos", "a/x.jpg", "c/y.jpg")
    (photos / "b").mkdir()
    (photos / ".thumbnails").mkdir()
    assert sorted(_labels(make(photos))) == [b"0", b"2"]


def test_a_folder_without_images_is_refused(make, tmp_path):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "class" / "a.gif").write_bytes(encode(photo(0), "GIF"))
    with pytest.raises(FileNotFoundError, match=r"holds no images, but 1 \.gif"):
        make(tmp_path / "empty")


def test_a_folder_of_splits_is_no_folder_of_classes(make, tmp_path):
    photos = _scatter(tmp_path / "photos", "train/cat/x.jpg", "val/cat/y.jpg")
    with pytest.raises(UserError, match=r"photos holds splits, not classes: train, val; give one"):
        make(photos)
    assert _labels(make(photos / "train")) == [b"0"]
    assert _labels(make(photos, out="both", unlabelled=True)) == [None, None]


@pytest.mark.parametrize("split", ["", "a/b", "tr{a,b}"])
def test_a_split_that_can_name_no_shards_is_refused(split):
    with pytest.raises(UserError, match="--split"):
        MakeShards(source="photos", out="shards", split=split)
