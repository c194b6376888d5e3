import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import chunk
from samples import encode, photo, photo_members, tar_bytes

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.validity import look_up
from famt.pipeline.errors import CacheFullError
from famt.pipeline.scoring.judge import judge_shards
from famt.pipeline.scoring.precompute import precompute_shard


def _tars(folder, count, damaged=False):
    urls = []
    for number in range(count):
        members = [*photo_members(4, 10 * number), ("bad.jpg", b"garbage")]
        path = folder / f"{number}.tar"
        path.write_bytes(tar_bytes(members).rstrip(b"\0") if damaged else tar_bytes(members))
        urls.append(str(path))
    return urls


def test_what_shards_hold_is_found_without_any_score(tmp_path, cache):
    urls = _tars(tmp_path, 3)
    assert judge_shards(urls, cache) == {}
    shards = look_up(urls, cache, None)
    assert shards.stale == {}
    for record in shards.records.values():
        table = cache.read_table(record.shard_id)
        assert (table.kept, [bad.key for bad in table.rejected]) == (4, ["bad"])
    assert [each.specs for each in cache.entries()] == [[], [], []]


def test_the_score_job_goes_by_the_samples_that_are_there(tmp_path, cache, spec):
    (url,) = _tars(tmp_path, 1)
    judge_shards([url], cache)
    (record,) = look_up([url], cache, None).records.values()
    entry = Path(cache.url) / "shards" / record.shard_id
    before = {path: path.stat().st_mtime_ns for path in entry.rglob("*") if path.is_file()}
    report = precompute_shard(url, cache, spec)
    assert (report.kept, report.quarantined, report.decoded) == (4, 1, 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert cache.read_maps(report.shard_id, spec).shape == (4, 7, 7)
    alone = ScoreCache(str(tmp_path / "alone"), create=True)
    precompute_shard(url, alone, spec)
    assert cache.read_table(report.shard_id).key == alone.read_table(report.shard_id).key


def test_a_shard_of_known_content_is_only_hashed(tmp_path, cache):
    urls = _tars(tmp_path, 2)
    judge_shards(urls[:1], cache)
    Path(urls[0]).touch()
    assert judge_shards(urls[:1], cache, known_only=True) == {}
    assert judge_shards(urls[1:], cache, known_only=True) == {urls[1]: "its content is new"}
    assert set(look_up(urls, cache, None).stale) == {urls[1]}


def test_what_can_not_be_read_is_told_and_the_others_are_done(tmp_path, cache, capsys):
    urls = _tars(tmp_path, 2, damaged=True)
    Path(urls[0]).write_bytes(b"no tar")
    gone = str(tmp_path / "gone.tar")
    failed = judge_shards([gone, *urls], cache)
    assert set(failed) == {gone, urls[0]}
    assert "no image in it" in failed[urls[0]]
    assert f"damaged: {urls[1]}: " in capsys.readouterr().err
    assert set(look_up(urls, cache, None).stale) == {urls[0]}


def test_what_libraries_say_of_an_odd_image_is_not_shown_and_the_rest_is(tmp_path, cache, capfd):
    """An iCCP chunk that is too short: libpng warns, and the image is kept."""
    whole = encode(photo(0), "PNG")
    odd = whole[:33] + chunk(b"iCCP", b"x\0\0") + whole[33:]
    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.png", odd), ("b.png", b"garbage")]))
    assert judge_shards([str(tmp_path / "0.tar")], cache) == {}
    program = """
import sys
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.scoring.judge import judge_shards
print(judge_shards([sys.argv[1]], ScoreCache(sys.argv[2], create=True)))
"""
    command = [sys.executable, "-c", program, tmp_path / "0.tar", tmp_path / "other"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "{}\n"
    for said in (capfd.readouterr().err, done.stderr):
        assert "libpng" not in said
        assert "checking shards: 100%" in said
        assert "1 of 2 images can't be used" in said


@pytest.mark.parametrize("number", [28, 122])  # ENOSPC, EDQUOT
def test_no_room_and_no_quota_end_all_work_at_once(tmp_path, cache, spec, monkeypatch, number):
    urls = _tars(tmp_path, 40)
    puts = []

    def refuse(store, path, data, **options):
        puts.append(path)
        raise storage.BaseError(f"Unable to copy data to file: no more (os error {number})")

    monkeypatch.setattr(storage.obstore, "put", refuse)
    with pytest.raises(CacheFullError, match=rf"score cache {cache.url} is full .* gc --cache"):
        precompute_shard(urls[0], cache, spec)
    with pytest.raises(CacheFullError, match="is full"):
        judge_shards(urls, cache)
    assert len(puts) < 20


def _index(urls, url):
    judge_shards(urls, ScoreCache(url, create=True))


@pytest.mark.slow
def test_two_processes_that_do_the_same_do_each_other_no_harm(tmp_path):
    urls = _tars(tmp_path, 6)
    url = str(tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_index, args=(urls, url)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    cache = ScoreCache(url)
    shards = look_up(urls, cache, None)
    assert shards.stale == {}
    assert all(len(cache.read_table(each.shard_id).key) == 4 for each in shards.records.values())
