import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3_server import environment, free_port
from samples import photo_members, score, tar_bytes

from jobs.cache import Gc, Ls, Show, Verify, main
from pipeline.cache import ScoreCache
from pipeline.manifest import CacheError
from pipeline.scores import ScoreSpec
from pipeline.table import load_samples

ROOT = Path(__file__).parents[2]


@pytest.fixture
def with_bad(scored, spec):
    path = scored.folder / "train-000003.tar"
    path.write_bytes(tar_bytes([*photo_members(2, 60), ("oops.jpg", b"garbage")]).rstrip(b"\0"))
    score([path], scored.cache, spec)
    score([Path(scored.shards[0])], scored.cache, ScoreSpec(kind="lowpass", grid=7))
    return scored


def test_ls_tells_folders_counts_and_coverage(with_bad, capsys):
    assert main(Ls(with_bad.cache.url)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{with_bad.folder}\n  4 of 4 shards whole")
    assert "28 images kept, 1 quarantined" in out
    assert f"{with_bad.spec.id}: 4 shards (100%)" in out
    assert "lowpass" in out
    assert "1 shards (25%)" in out


def test_ls_bad_lists_every_reason(with_bad, capsys):
    main(Ls(with_bad.cache.url, bad=True))
    lines = capsys.readouterr().out.splitlines()
    assert any("train-000003.tar:oops: no JPEG" in line for line in lines)
    assert all("train-000003.tar" in line for line in lines)


def test_verify_agrees_with_a_sound_cache(with_bad, capsys):
    assert main(Verify(with_bad.cache.url)) == 0
    assert "4 of 4 entries agree" in capsys.readouterr().out


def test_verify_finds_maps_that_are_not_the_tars(scored, capsys):
    shard_id = load_samples(scored.shards[:1], scored.cache).shard_ids[0]
    table = scored.cache.read_table(shard_id)
    maps = scored.cache.read_maps([shard_id], scored.spec)[0]
    scored.cache.write(shard_id, table, scored.spec, np.roll(maps, 1, axis=0))
    assert main(Verify(scored.cache.url)) == 1
    assert "train-000000.tar: border_geodesic" in capsys.readouterr().out


def test_verify_finds_an_object_that_went_missing(scored, capsys):
    shard_id = load_samples(scored.shards[:1], scored.cache).shard_ids[0]
    shutil.rmtree(Path(scored.cache.url) / "shards" / shard_id / "samples" / "c")
    assert main(Verify(scored.cache.url)) == 1
    assert "train-000000.tar: " in capsys.readouterr().out


def test_verify_finds_tars_that_changed_or_went(scored, capsys):
    Path(scored.shards[0]).write_bytes(tar_bytes(photo_members(3, 70)))
    Path(scored.shards[1]).unlink()
    assert main(Verify(scored.cache.url)) == 1
    out = capsys.readouterr().out
    assert "train-000000.tar: the tar has changed" in out
    assert "train-000001.tar: the tar is gone" in out
    assert "1 of 3 entries agree" in out


def _age(cache):
    old = time.time() - 3 * 24 * 3600
    for path in Path(cache.url).rglob("*"):
        os.utime(path, (old, old))


def test_gc_removes_what_no_manifest_names_and_partial_writes(scored, spec, tmp_path, capsys):
    cache = scored.cache
    ids = load_samples(scored.shards, cache).shard_ids
    Path(scored.shards[0]).write_bytes(tar_bytes(photo_members(3, 70)))
    score([Path(scored.shards[0])], cache, spec)  # the old entry has no name any more
    partial = Path(cache.url) / "shards" / ("f" * 32)
    shutil.copytree(Path(cache.url) / "shards" / ids[1], partial)
    (partial / "zarr.json").unlink()
    main(Gc(cache.url))
    assert len(list(cache.entries())) == 5  # all are new: a job may be at work
    _age(cache)
    main(Gc(cache.url, dry_run=True))
    assert len(list(cache.entries())) == 5
    main(Gc(cache.url))
    out = capsys.readouterr().out
    assert f"{ids[0]}: " in out
    assert "only partly written" in out
    assert {entry.shard_id for entry in cache.entries()} >= set(ids[1:])
    assert len(list(cache.entries())) == 3
    assert len(load_samples(scored.shards, cache)) == 19


def _killed(code, *arguments):
    """Run code that kills its own process."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def _everything(cache):
    return {str(path) for path in Path(cache.url).rglob("*") if path.is_file()}


def test_gc_removes_the_staging_files_of_killed_writers(scored, capsys):
    cache = scored.cache
    before = _everything(cache)
    (shard_id, *_) = load_samples(scored.shards, cache).shard_ids
    code = """
import os, signal, sys
import obstore
from obstore.store import LocalStore

def parts():
    yield bytes(6_000_000)
    yield bytes(6_000_000)
    os.kill(os.getpid(), signal.SIGKILL)

obstore.put(LocalStore(sys.argv[1]), sys.argv[2], parts(), max_concurrency=1)
"""
    for place in (f"shards/{shard_id}/zarr.json", "shards/new/samples/c/0/0"):
        _killed(code, cache.url, place)
    assert {Path(name).name for name in _everything(cache) - before} == {"zarr.json#1", "0#1"}
    assert main(Gc(cache.url)) == 0
    assert len(_everything(cache) - before) == 2  # new ones may be a live writer's
    _age(cache)
    assert main(Gc(cache.url, dry_run=True)) == 0
    assert len(_everything(cache) - before) == 2
    assert main(Gc(cache.url)) == 0
    assert "a staging file" in capsys.readouterr().out
    assert _everything(cache) == before


def test_gc_removes_maps_that_were_never_finished_from_whole_entries(scored, capsys):
    """A job that adds a second score is killed after it put the first object of it."""
    cache = scored.cache
    before = _everything(cache)
    code = """
import os, signal, sys
from pipeline import storage
from pipeline.cache import ScoreCache
from pipeline.precompute import precompute_shard
from pipeline.scores import ScoreSpec

put = storage.put

def put_one(*arguments):
    put(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

storage.put = put_one
precompute_shard(sys.argv[1], ScoreCache(sys.argv[2]), ScoreSpec(kind="lowpass", grid=7))
"""
    _killed(code, scored.shards[0], cache.url)
    (left,) = _everything(cache) - before
    assert "/lowpass-" in left
    main(Gc(cache.url))
    assert Path(left).exists()
    _age(cache)
    main(Gc(cache.url, dry_run=True))
    assert Path(left).exists()
    main(Gc(cache.url))
    assert "unfinished" in capsys.readouterr().out
    assert _everything(cache) == before
    assert len(load_samples(scored.shards, cache)) == 26


def test_gc_forgets_shards_that_were_deleted(scored, spec, capsys):
    cache = scored.cache
    ids = load_samples(scored.shards, cache).shard_ids
    copy = scored.folder / "copy.tar"
    shutil.copy(scored.shards[1], copy)
    score([copy], cache, spec)
    for path in scored.shards[:2]:
        Path(path).unlink()
    _age(cache)
    assert main(Gc(cache.url, dry_run=True)) == 0
    assert len(cache.manifests.read(str(scored.folder))) == 4
    assert main(Gc(cache.url)) == 0
    assert "train-000000.tar: the tar is gone" in capsys.readouterr().out
    assert set(cache.manifests.read(str(scored.folder))) == {"copy.tar", "train-000002.tar"}
    assert {entry.shard_id for entry in cache.entries()} == {ids[1], ids[2]}
    assert len(load_samples([str(scored.folder)], cache)) == 16


@pytest.mark.parametrize("state", ["empty", "missing"])
def test_gc_takes_a_disk_that_is_not_mounted_for_no_deletion(scored, spec, capsys, state):
    cache = scored.cache
    away = scored.folder.rename(scored.folder.with_name("away"))
    if state == "empty":
        scored.folder.mkdir()
    _age(cache)
    before = _everything(cache)
    assert main(Gc(cache.url)) == 1
    error = capsys.readouterr().err
    assert str(scored.folder) in error
    assert "its 3 shards keep their scores" in error
    assert (Path(cache.url) / error.split(f"{cache.url}/")[1].strip()).is_dir()
    assert _everything(cache) == before
    shutil.rmtree(scored.folder, ignore_errors=True)
    away.rename(scored.folder)
    assert len(load_samples(scored.shards, cache)) == 26


def test_gc_takes_a_store_out_of_reach_for_no_deletion(scored, capsys, monkeypatch):
    """Shards on S3, and nothing listens at its endpoint."""
    for name, value in environment(f"http://127.0.0.1:{free_port()}").items():
        monkeypatch.setenv(name, value)
    cache = scored.cache
    records = cache.manifests.read(str(scored.folder))
    cache.manifests.publish({f"s3://away/shards/{name}": r for name, r in records.items()})
    for path in scored.shards[1:]:
        Path(path).unlink()
    _age(cache)
    assert main(Gc(cache.url)) == 1
    assert "s3://away/shards can't be listed" in capsys.readouterr().err
    assert cache.manifests.read("s3://away/shards") == records
    assert set(cache.manifests.read(str(scored.folder))) == {"train-000000.tar"}
    assert len(list(cache.entries())) == 3


def test_show_draws_photos_beside_their_maps(scored, tmp_path):
    out = tmp_path / "maps.png"
    main(Show(scored.cache.url, scored.shards, out, images=3, spec=scored.spec))
    width, height = Image.open(out).size
    assert 0.5 < width / height < 0.8


def test_a_removed_entry_is_missed_by_name(scored, spec):
    (shard_id,) = load_samples(scored.shards[:1], scored.cache).shard_ids
    scored.cache.remove(shard_id)
    assert not scored.cache.has_entry(shard_id, None)
    with pytest.raises(CacheError, match="no whole entry"):
        scored.cache.read_maps([shard_id], spec)[0]
    with pytest.raises(CacheError, match=r"has no maps of .*precompute_freq"):
        load_samples(scored.shards, ScoreCache(scored.cache.url))


def test_stored_specs_are_known_again(scored, spec):
    (shard_id,) = load_samples(scored.shards[:1], scored.cache).shard_ids
    assert scored.cache.stored_spec(shard_id, spec.id) == spec
    banded = dataclasses.replace(spec, kind="bandpass", band=(1.0, 5.0))
    assert ScoreSpec.from_description(banded.describe()) == banded
    assert ScoreSpec.from_description({**spec.describe(), "code_version": -1}) is None
