import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from samples import encode, photo, photo_members, tar_bytes, write_tar

from famt.frequency import pixel_frequency
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import UserError
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.decode import BadImage, decode
from famt.pipeline.scoring.precompute import precompute_shard, score_shard


def test_maps_are_the_scores_of_the_images_in_tar_order(spec):
    scored = score_shard(tar_bytes(photo_members(20)), spec)
    assert scored.maps.dtype == np.float16
    assert scored.table.key == [f"img{n:04d}" for n in range(20)]
    assert scored.table.samples[:, 2].tolist() == [n % 3 for n in range(20)]
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


def test_judging_alone_gives_the_table_that_scoring_gives(spec):
    data = tar_bytes(
        [*photo_members(3), ("bad.jpg", b"garbage"), ("d.png", encode(photo(4), "PNG"))]
    )
    judged, scored = (score_shard(data, each).table for each in (None, spec))
    assert judged.rejected == scored.rejected
    assert judged.same_rows(scored)


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyError("a slip")])
def test_only_a_decoders_verdict_quarantines(spec, monkeypatch, error):
    def fail(data, size):
        raise error

    monkeypatch.setattr("famt.pipeline.scoring.precompute.decode", fail)
    with pytest.raises(type(error)):
        score_shard(tar_bytes(photo_members(2)), spec)


def test_a_shard_of_only_bad_images_has_an_empty_entry(spec, tmp_path):
    path = write_tar(tmp_path / "bad.tar", [("a.jpg", b"x"), ("b.jpg", b"y")])
    report = precompute_shard(str(path), ScoreCache(str(tmp_path / "c"), create=True), spec)
    assert (report.kept, report.quarantined) == (0, 2)


def test_the_same_tar_is_never_scored_twice(tmp_path, cache, spec):
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


def test_a_second_score_goes_by_the_table_of_the_first(tmp_path, cache, spec, monkeypatch):
    """Even if the decoder has become stricter: the maps of both must lie in the same rows."""
    path = write_tar(tmp_path / "a.tar", [*photo_members(3), ("odd.jpg", b"garbage")])
    first = precompute_shard(str(path), cache, spec)
    table = cache.read_table(first.shard_id)
    other = ScoreSpec(kind="lowpass", grid=7)
    again = precompute_shard(str(path), cache, other)
    assert (again.kept, again.quarantined) == (first.kept, first.quarantined) == (3, 1)
    assert cache.read_table(first.shard_id).key == table.key

    def stricter(data, size):
        raise BadImage("not to my taste")

    monkeypatch.setattr("famt.pipeline.scoring.precompute.decode", stricter)
    with pytest.raises(UserError, match=r"a\.tar: img0000 was kept before.*not to my taste"):
        precompute_shard(str(path), cache, ScoreSpec(kind="highpass", grid=7))
    assert cache.read_table(first.shard_id).key == table.key


def _keep(*keys):
    """A decoder that refuses all images but those of certain seeds."""
    liked = {encode(photo(n), quality=92) for n in keys}

    def decoder(data, size):
        if data not in liked:
            raise BadImage("not to my taste")
        return decode(data, size)

    return decoder


def test_another_verdict_gives_a_shard_another_entry_that_all_scores_then_go_by(
    tmp_path, cache, spec, monkeypatch
):
    path = write_tar(tmp_path / "a.tar", photo_members(4))
    ids = []
    for keys in ((0, 1), (1, 2), (0, 1, 2, 3)):
        monkeypatch.setattr("famt.pipeline.scoring.precompute.decode", _keep(*keys))
        report = precompute_shard(str(path), cache, spec, retry_bad=True)
        assert (report.kept, report.quarantined) == (len(keys), 4 - len(keys))
        assert cache.read_table(report.shard_id).key == [f"img{n:04d}" for n in keys]
        assert len(cache.read_maps(report.shard_id, spec)) == len(keys)
        ids.append(report.shard_id)
    assert len(set(ids)) == 3
    other = ScoreSpec(kind="lowpass", grid=7)
    assert precompute_shard(str(path), cache, other).shard_id == ids[-1]
    again = precompute_shard(str(path), cache, spec, retry_bad=True)
    assert (again.shard_id, again.decoded) == (ids[-1], 4)


def test_a_worker_that_scores_imports_no_models_and_no_dali():
    """They take 125 MB of each worker and seconds of a job's start."""
    program = "import sys, famt.pipeline.scoring.precompute; print(*{*%s} & {*sys.modules})"
    program %= ["timm", "torchvision", "nvidia.dali"]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")
