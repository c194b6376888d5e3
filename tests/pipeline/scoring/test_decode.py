import io
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from random import Random

import hostile
import numpy as np
import pytest
import torch
from hostile import exif, hide_exif, png_extent, riff, segment, webp_chunks, with_segments, xmp
from launch import program_file
from PIL import Image
from samples import encode, photo, score, write_tar
from sklearn.datasets import load_sample_image

import famt.pipeline.scoring.decode
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig, WholeView
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.decode import BadImage, decode, plain_jpeg_extent


def test_images_are_decoded_upright():
    picture = photo(3, 40, 60)
    turned = encode(np.rot90(picture), quality=95, exif=b"Exif\0\0" + exif(6))
    difference = decode(turned, 20).astype(int) - decode(encode(picture, quality=95), 20)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")],
)
def test_each_format_becomes_rgb(kind, mode):
    data = encode(Image.fromarray(photo(0)).convert(mode), kind)
    assert decode(data, 16).shape == (16, 16, 3)


def test_a_scaled_decode_scores_like_a_full_one():
    spec = ScoreSpec()
    data = encode(photo(5, 480, 640), quality=90)
    full = Image.open(io.BytesIO(data)).resize((spec.size, spec.size), Image.Resampling.BOX)
    images = torch.from_numpy(np.stack([decode(data, spec.size), np.array(full)]))
    a, b = spec.score(images).flatten(1)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99


def _with_steps(jpeg: bytes, change: Callable[[int, int], int]) -> bytes:
    """A JPEG whose first quantisation table has steps `change(n, step)`, `n` in zigzag order."""
    at = jpeg.index(b"\xff\xdb") + 5
    steps = [change(n, step) for n, step in enumerate(jpeg[at : at + 64])]
    return jpeg[:at] + bytes(min(255, step) for step in steps) + jpeg[at + 64 :]


@pytest.mark.parametrize(
    "change",
    [lambda n, step: 7 * step, lambda n, step: 255 if n == 20 else step],
    ids=["clipped", "one step"],
)
@pytest.mark.parametrize("colours", [slice(None), 0], ids=["colour", "grey"])
def test_a_damaged_jpeg_scores_like_its_full_decode(change, colours):
    """A scaled decode clips too late, and knows no high frequencies."""
    spec = ScoreSpec()
    data = _with_steps(encode(load_sample_image("china.jpg")[..., colours], quality=90), change)
    images = [decode(data, spec.size)]
    for scale in (1, 8):
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (image.width // scale, image.height // scale))
        image = image.convert("RGB").resize((spec.size, spec.size), Image.Resampling.BOX)
        images.append(np.array(image))
    ours, full, scaled = spec.score(torch.from_numpy(np.stack(images))).flatten(1)
    assert torch.corrcoef(torch.stack([ours, full]))[0, 1] > 0.99
    assert torch.corrcoef(torch.stack([scaled, full]))[0, 1] < 0.97


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_decompression_bomb_is_refused_from_its_header(kind):
    with pytest.raises(BadImage, match="too large"):
        decode(encode(Image.new("L", (12_000, 12_000)), kind), 16)


SMALL = encode(photo(0, 40, 64), "PNG")


@pytest.mark.parametrize(
    "extent", [(40 | 1 << 31, 64), (40, 64 | 1 << 31), (40 | 1 << 31, 64 | 1 << 31), (0, 64)]
)
def test_an_extent_that_is_none_is_a_verdict_on_the_image(extent):
    with pytest.raises(BadImage):
        decode(png_extent(SMALL, *extent), 16)


def test_sides_end_where_those_of_jpegs_do():
    """Out of images of 270,000 px height and more, DALI draws crops that lie outside, or dies."""
    assert decode(encode(Image.new("L", (2, 65_535)), "PNG"), 16).shape == (16, 16, 3)
    for extent in ((2, 65_536), (65_536, 2)):
        with pytest.raises(BadImage, match="too large"):
            decode(encode(Image.new("L", extent), "PNG"), 16)


@pytest.mark.parametrize("how", ["beyond", "across", "unpadded"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_a_webp_whose_exif_only_the_decoder_finds_is_refused_unless_upright(turned, how):
    """With 5 to 8 it decodes to another shape than DALI makes room for, which ends the epoch."""
    whole = riff([*webp_chunks(Random(0)), (b"EXIF", exif(turned))])
    assert decode(whole, 16).shape == (16, 16, 3)
    refused = pytest.raises(BadImage, match="EXIF orientation")
    with nullcontext() if turned == 1 else refused:
        decode(hide_exif(riff(webp_chunks(Random(0))), exif(turned), how), 16)


def test_what_decodes_to_another_extent_than_its_headers_announce_is_refused(monkeypatch):
    """Whatever the reason."""
    monkeypatch.setattr(famt.pipeline.scoring.decode, "is_ambiguous", lambda data: False)
    monkeypatch.setattr(famt.pipeline.scoring.decode, "may_be_turned", lambda data: False)
    data = hide_exif(riff(webp_chunks(Random(0))), exif(6), "beyond")
    with pytest.raises(BadImage, match=r"announce \(40, 64\) px .*decodes to \(64, 40\)"):
        decode(data, 16)


@pytest.mark.parametrize(
    "data", [b"", b"garbage", encode(photo(0), "GIF"), encode(photo(0), "BMP")]
)
def test_other_formats_are_refused_with_a_reason(data):
    with pytest.raises(BadImage, match="not a JPEG, PNG or WebP"):
        decode(data, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("metadata", [{}, {"exif": b"Exif\0\0" + exif(6)}])
def test_what_is_cut_off_is_refused(kind, metadata):
    data = encode(photo(0, 80, 90), kind, **metadata)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))], 16)


def test_stray_bytes_between_jpeg_segments_are_refused_as_dali_refuses_them():
    data = encode(photo(0))
    stray = data[:20] + b"stray" + data[20:]  # after the JFIF segment; Pillow looks past it
    Image.open(io.BytesIO(stray)).load()
    with pytest.raises(BadImage, match="DALI can't parse"):
        decode(stray, 16)


def test_only_jpegs_that_all_decoders_read_alike_are_plain():
    jpeg = encode(photo(0, 40, 60))
    assert plain_jpeg_extent(jpeg) == (40, 60)
    assert plain_jpeg_extent(encode(photo(0, 40, 60), progressive=True)) == (40, 60)
    assert plain_jpeg_extent(encode(photo(0, 40, 60)[..., 0])) == (40, 60)
    upright = segment(0xE1, b"Exif\0\0" + exif(1))
    unread = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6))  # by DALI
    assert plain_jpeg_extent(with_segments(jpeg, upright, unread)) == (40, 60)
    scans = encode(photo(0), progressive=True)
    last = scans.rindex(b"\xff\xda")
    for odd in (
        scans[:last] + 200 * scans[last:-2],  # nvImageCodec counts them, Pillow does not
        with_segments(jpeg, segment(0xE1, b"Exif\0\0" + exif(6))),
        with_segments(jpeg, segment(0xE1, b"Exif\0\0" + exif(1, kind=hostile.BYTE))),
        with_segments(jpeg, segment(0xE2, b"MPF\0" + bytes(20))),
        jpeg[:2] + b"\xff" + jpeg[2:],
        jpeg[:20] + b"stray" + jpeg[20:],
        _with_steps(jpeg, lambda n, step: 250 if n == 40 else step),
        encode(Image.fromarray(photo(0)).convert("CMYK")),
        hostile.lossless_jpeg(photo(0)[..., 0]),
        encode(photo(0), "PNG"),
        jpeg[:100],
        b"",
    ):
        assert plain_jpeg_extent(odd) is None


def test_too_little_memory_is_no_verdict_on_an_image():
    command = [sys.executable, program_file("decode_in_little_memory")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.split() == ["MemoryError"] * 3, result.stderr


KINDS = {**hostile.METADATA, **hostile.STRUCTURE}


def test_maps_lie_as_the_loaders_pixels_whatever_the_metadata(tmp_path, cache):
    """Of each kind some files: what is kept decodes in DALI, and looks there as it did here."""
    spec = ScoreSpec()
    members = [
        (f"{kind}-{n}.jpg", make(Random(n))) for kind, make in KINDS.items() for n in range(6)
    ]
    path = write_tar(tmp_path / "odd.tar", members)
    score([path], cache, spec)
    table = load_samples([str(path)], cache)
    config = LoaderConfig(
        16, image_size=spec.size, view=WholeView(), interpolation="bilinear", shuffle_buffer=0
    )
    files = dict(members)
    seen = set()
    for crops in CropLoader(table, config, drop_last=False):
        for pixels, row in zip(crops.images, crops.rows.tolist(), strict=True):
            key = table.key(row).rpartition(":")[2]
            ours = decode(files[f"{key}.jpg"], spec.size).astype(int)
            assert np.abs(ours - pixels.numpy()).mean() < 6, key
            seen.add(key.partition("-")[0])
    refused = {"jpeg_lossless_grey", "jpeg_two_exif", "png_animated", "png_bad_crc", "png_two_exif"}
    assert seen == set(KINDS) - refused


def test_threads_decode_side_by_side():
    images = [encode(photo(n, 90, 70), "PNG") for n in range(40)]
    expected = [decode(each, 32) for each in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: decode(each, 32), images * 4))
    for first, second in zip(expected * 4, found, strict=True):
        np.testing.assert_array_equal(first, second)
