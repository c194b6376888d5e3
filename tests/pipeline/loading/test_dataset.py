import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import photo_members, score, tar_bytes, write_tar

from famt.pipeline import storage
from famt.pipeline.errors import CacheError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.scores import ScoreSpec


def test_rows_follow_the_shards_and_their_samples(scored, table):
    assert len(table) == 26
    assert table.first_row == [0, 10, 17, 26]
    assert table.labels.tolist() == [n % 3 for n in range(26)]
    assert table.key(0) == f"{scored.shards[0]}:img0000"
    assert table.key(16) == f"{scored.shards[1]}:img0016"
    assert table.key(17) == f"{scored.shards[2]}:img0017"
    maps = load_maps(table, scored.cache, scored.spec)
    expected = torch.tensor(scored.cache.read_maps(table.shard_ids[1], scored.spec))
    assert torch.equal(maps[10:17], expected)
    torch.testing.assert_close(maps.float().mean((1, 2)), torch.ones(26), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("rows", "counts"),
    [(range(26), [10, 7, 9]), (range(10, 17), [0, 7, 0]), (range(9, 19), [1, 7, 2])],
)
def test_indices_are_of_some_rows_and_carry_their_numbers(scored, table, tmp_path, rows, counts):
    shards = table.write_indices(tmp_path, rows)
    assert shards == [shard for shard, count in enumerate(counts) if count]
    lines = [(tmp_path / f"{shard}.idx").read_text().split("\n") for shard in shards]
    assert [each[0] for each in lines] == [f"v1.2 {count}" for count in counts if count]
    assert [each[-1] for each in lines] == ["" for _ in shards]
    samples = np.concatenate([scored.cache.read_samples(each) for each in table.shard_ids])
    expected = [f"jpg {samples[row, 0]} {samples[row, 1]} {row}" for row in rows]
    assert [line for each in lines for line in each[1:-1]] == expected


def test_a_digest_follows_contents_and_order(scored):
    digests = {
        load_samples(shards, scored.cache).digest
        for shards in (scored.shards, scored.shards[::-1], scored.shards[:2])
    }
    assert len(digests) == 3


def test_a_changed_shard_is_found_and_named_with_the_repair(scored, spec):
    path = Path(scored.shards[1])
    path.write_bytes(tar_bytes(photo_members(7, 50)))
    with pytest.raises(CacheError, match=r"changed since.*\(its content is new\)") as error:
        load_samples(scored.shards, scored.cache, spec)
    assert str(path) in str(error.value)
    assert "famt score --shards" in str(error.value)


def test_a_shard_whose_times_alone_changed_is_hashed_and_not_scored(scored, spec):
    """It was copied, restored from a backup, or given another owner."""
    os.utime(scored.shards[0], (1, 1))
    before = {each: each.stat().st_mtime_ns for each in Path(scored.cache.url).glob("shards/*/*")}
    samples = load_samples(scored.shards, scored.cache, spec)
    assert len(load_maps(samples, scored.cache, spec)) == 26
    assert len(before) == 6
    assert {each: each.stat().st_mtime_ns for each in before} == before


def test_copied_shards_find_their_scores_and_are_hashed_alone(scored, spec, tmp_path):
    """Into another folder, on another disk: the cache knows their content."""
    shutil.copytree(scored.folder, tmp_path / "copies")
    samples = load_samples([str(tmp_path / "copies")], scored.cache, spec)
    assert samples.digest == load_samples(scored.shards, scored.cache, spec).digest
    assert len(load_maps(samples, scored.cache, spec)) == 26


def test_of_many_shards_that_nobody_scored_only_the_first_are_read(scored, spec, monkeypatch):
    for n in range(200):
        (scored.folder / f"unknown-{n}.tar").write_bytes(tar_bytes(photo_members(1, n)))
    read, reads = storage.read, []
    monkeypatch.setattr(storage, "read", lambda url: reads.append(url) or read(url))
    with pytest.raises(CacheError, match=r"does not know this shard.*\(and 199 more shards\)"):
        load_samples([str(scored.folder)], scored.cache, spec)
    assert len(reads) < 100


def test_shards_that_nobody_scored_are_judged_on_first_use(scored, spec, capsys):
    members = [*photo_members(3, 50), ("bad.jpg", b"garbage"), ("bad.json", b"{}")]
    (scored.folder / "new.tar").write_bytes(tar_bytes(members))
    assert len(load_samples([str(scored.folder)], scored.cache)) == 29
    said = capsys.readouterr().err
    assert "checking shards" in said
    assert "1 of 4 images can't be used" in said
    assert "passed over in the shards: 1 .json; images are files of" in said
    assert len(load_samples([str(scored.folder)], scored.cache)) == 29
    assert capsys.readouterr().err == ""
    with pytest.raises(CacheError, match=rf"new\.tar: .*has no maps of {spec.id}"):
        load_samples([str(scored.folder)], scored.cache, spec)


def test_a_shard_that_is_no_tar_is_named_with_what_is_wrong(scored):
    (scored.folder / "new.tar").write_bytes(b"no tar")
    with pytest.raises(CacheError, match=r"does not know this shard \(.*new\.tar: no image in it"):
        load_samples([str(scored.folder)], scored.cache)


def test_a_spec_that_was_never_computed_is_named(scored):
    other = ScoreSpec(kind="bandpass", band=(2.0, 9.0))
    with pytest.raises(CacheError, match=other.id) as error:
        load_samples(scored.shards, scored.cache, other)
    assert "--spec.kind bandpass --spec.band 2.0 9.0" in str(error.value)


def test_shards_of_nothing_but_bad_images_are_an_error(scored, tmp_path, spec):
    path = write_tar(tmp_path / "bad.tar", [("a.jpg", b"x")])
    score([path], scored.cache, spec)
    with pytest.raises(CacheError, match="quarantined"):
        load_samples([str(path)], scored.cache)
