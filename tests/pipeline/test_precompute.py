import io

import numpy as np
import pytest
import torch
from PIL import Image
from samples import encode, photo, photo_members, tar_bytes

from famt.frequency import pixel_frequency
from pipeline.cache import ScoreCache
from pipeline.precompute import BadImage, decode, precompute_shard, score_shard
from pipeline.scores import ScoreSpec


def test_maps_are_the_scores_of_the_images_in_tar_order(spec):
    scored = score_shard(tar_bytes(photo_members(20)), spec)
    assert scored.maps.dtype == np.float16
    assert scored.table.key == [f"img{n:04d}" for n in range(20)]
    assert scored.table.label.tolist() == [n % 3 for n in range(20)]
    for n in (0, 15, 16, 19):
        picture = Image.open(io.BytesIO(encode(photo(n), quality=92)))
        small = picture.resize((spec.size, spec.size), Image.Resampling.BOX)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
        expected = pixel_frequency(pixels, spec.grid)[0]
        np.testing.assert_allclose(scored.maps[n], expected.numpy(), atol=2e-3, rtol=2e-3)


def test_kept_and_quarantined_are_all_that_was_seen(spec):
    good = encode(photo(0))
    bad = {"garbage": b"garbage", "cut": good[: len(good) // 2], "gif": encode(photo(1), "GIF"),
           "empty": b""}  # fmt: skip
    members = [("good.jpg", good), *((f"{k}.jpg", v) for k, v in bad.items()), ("last.jpg", good)]
    scored = score_shard(tar_bytes(members), spec)
    assert scored.table.key == ["good", "last"]
    assert len(scored.maps) == 2
    assert len(scored.table.rejected) == len(bad)
    assert all(each.reason for each in scored.table.rejected)


def test_a_tar_without_images_is_an_error_that_names_it(spec):
    with pytest.raises(ValueError, match=r"train-7\.tar: no image"):
        score_shard(tar_bytes([("a.txt", b"hi")]), spec, "train-7.tar")


def test_a_shard_of_only_bad_images_has_an_empty_entry(spec, tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes(tar_bytes([("a.jpg", b"x"), ("b.jpg", b"y")]))
    report = precompute_shard(str(path), ScoreCache(str(tmp_path / "c"), create=True), spec)
    assert (report.kept, report.quarantined) == (0, 2)


def test_images_are_decoded_upright():
    picture = photo(3, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left; a viewer turns it right
    turned = encode(np.rot90(picture), quality=95, exif=exif)
    upright = encode(picture, quality=95)
    difference = decode(turned, 20).astype(int) - decode(upright, 20).astype(int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_format_decodes(kind):
    assert decode(encode(photo(0), kind), 16).shape == (16, 16, 3)


def test_grey_and_cmyk_become_rgb():
    picture = Image.fromarray(photo(0))
    for mode in ("L", "CMYK"):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, "JPEG")
        assert decode(buffer.getvalue(), 16).shape == (16, 16, 3)


def test_a_scaled_decode_scores_like_a_full_one():
    spec = ScoreSpec()
    data = encode(photo(5, 480, 640), quality=90)
    full = Image.open(io.BytesIO(data)).resize((spec.size, spec.size), Image.Resampling.BOX)
    images = torch.from_numpy(np.stack([decode(data, spec.size), np.array(full)]))
    a, b = spec.score(images).flatten(1)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99


def test_a_decompression_bomb_is_refused_from_its_header():
    buffer = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(buffer, "PNG")
    with pytest.raises(BadImage, match="absurdly large"):
        decode(buffer.getvalue(), 16)


def test_extended_webp_is_refused_since_dali_does_not_read_it():
    rgba = np.dstack([photo(0), np.full((40, 48), 128, np.uint8)])
    with pytest.raises(BadImage, match="extended WebP"):
        decode(encode(rgba, "WEBP"), 16)


def test_the_same_tar_is_never_scored_twice(tmp_path, spec):
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    data = tar_bytes(photo_members(4))
    for name in ("a.tar", "renamed.tar"):
        (tmp_path / name).write_bytes(data)
    first = precompute_shard(str(tmp_path / "a.tar"), cache, spec)
    second = precompute_shard(str(tmp_path / "renamed.tar"), cache, spec)
    assert (first.decoded, second.decoded) == (4, 0)
    assert first.shard_id == second.shard_id
    other = precompute_shard(str(tmp_path / "a.tar"), cache, ScoreSpec(kind="lowpass", grid=7))
    assert other.decoded == 4
    assert other.shard_id == first.shard_id


def test_a_second_score_goes_by_the_table_of_the_first(tmp_path, spec, monkeypatch):
    """Even if the decoder has become stricter: the maps of both must lie in the same rows."""
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([*photo_members(3), ("odd.jpg", b"garbage")]))
    first = precompute_shard(str(path), cache, spec)
    table = cache.read_table(first.shard_id)
    other = ScoreSpec(kind="lowpass", grid=7)
    again = precompute_shard(str(path), cache, other)
    assert (again.kept, again.quarantined) == (first.kept, first.quarantined) == (3, 1)
    assert cache.read_table(first.shard_id).key == table.key

    def stricter(data, size):
        raise BadImage("not to my taste")

    monkeypatch.setattr("pipeline.precompute.decode", stricter)
    with pytest.raises(ValueError, match=r"a\.tar: img0000 was kept before.*not to my taste"):
        precompute_shard(str(path), cache, ScoreSpec(kind="highpass", grid=7))
    assert cache.read_table(first.shard_id).key == table.key


def test_pixels_of_more_than_8_bits_are_refused():
    ramp = Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32))
    with pytest.raises(BadImage, match="more than 8 bits"):
        decode(encode(ramp, "PNG"), 16)


def test_an_orientation_in_xmp_alone_is_not_followed():
    """DALI does not follow it, so the map would lie turned on the crop."""
    picture = photo(3, 40, 60)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'  # noqa: E501
    turned = encode(picture, quality=95, xmp=xmp)
    assert b"tiff:Orientation" in turned
    assert (decode(turned, 20) == decode(encode(picture, quality=95), 20)).all()


def test_stray_bytes_between_jpeg_segments_are_refused_as_dali_refuses_them():
    data = encode(photo(0))
    stray = data[:20] + b"stray" + data[20:]  # after the JFIF segment; Pillow looks past it
    Image.open(io.BytesIO(stray)).load()
    with pytest.raises(BadImage, match="DALI can't parse"):
        decode(stray, 16)
