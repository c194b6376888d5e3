import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from launch import program_file
from PIL import Image
from s3_server import environment, free_port, serve
from samples import photo_members, score, tar_bytes

from famt.jobs.cache import Gc, Ls, Show, Verify, main
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.scores import ScoreSpec


def _images(shards, cache, spec):
    """How many images training would find, with their maps."""
    return len(load_maps(load_samples(shards, cache), cache, spec))


@pytest.fixture
def with_bad(scored, spec):
    path = scored.folder / "train-000003.tar"
    members = [*photo_members(2, 60), ("oops.jpg", b"garbage"), ("oops.cls", b"1")]
    path.write_bytes(tar_bytes(members).rstrip(b"\0"))
    score([path], scored.cache, spec)
    score([Path(scored.shards[0])], scored.cache, ScoreSpec(kind="lowpass", grid=7))
    return scored


def test_ls_tells_folders_counts_and_coverage(with_bad, capsys):
    assert main(Ls(with_bad.cache.url)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{with_bad.folder}\n  4 of 4 shards")
    assert "28 images kept, 1 quarantined" in out
    assert f"{with_bad.spec.id}: 4 shards (100%)" in out
    assert "lowpass" in out
    assert "1 shard (25%)" in out


def test_ls_bad_lists_every_reason(with_bad, capsys):
    main(Ls(with_bad.cache.url, bad=True))
    lines = capsys.readouterr().out.splitlines()
    assert any("train-000003.tar:oops: it is not a JPEG" in line for line in lines)
    assert all("train-000003.tar" in line for line in lines)


def test_verify_agrees_with_a_sound_cache(with_bad, capsys):
    assert main(Verify(with_bad.cache.url)) == 0
    assert "4 of 4 entries agree" in capsys.readouterr().out


def test_verify_finds_maps_that_are_not_the_tars(scored, capsys):
    shard_id = load_samples(scored.shards[:1], scored.cache).shard_ids[0]
    table = scored.cache.read_table(shard_id)
    maps = scored.cache.read_maps(shard_id, scored.spec)
    scored.cache.write(shard_id, table, scored.spec, np.roll(maps, 1, axis=0))
    assert main(Verify(scored.cache.url)) == 1
    assert "train-000000.tar: hypercomplex_fourier" in capsys.readouterr().out


def test_verify_counts_what_it_cannot_read_and_goes_on(scored, capsys):
    ids = load_samples(scored.shards, scored.cache).shard_ids
    table = Path(scored.cache.url) / "shards" / ids[0] / "table.zip"
    maps = Path(scored.cache.url) / "shards" / ids[1] / f"{scored.spec.id}.zip"
    table.unlink()
    maps.write_bytes(maps.read_bytes()[:-1] + b"?")
    assert main(Verify(scored.cache.url)) == 1
    out = capsys.readouterr().out
    assert f"train-000000.tar: {scored.cache.url} has no table for shard {ids[0]}" in out
    assert f"train-000001.tar: {maps} is damaged" in out
    assert "1 of 3 entries agree" in out


def test_verify_finds_tars_that_changed_or_went(scored, capsys):
    Path(scored.shards[0]).write_bytes(tar_bytes(photo_members(3, 70)))
    Path(scored.shards[1]).unlink()
    assert main(Verify(scored.cache.url)) == 1
    out = capsys.readouterr().out
    assert "train-000000.tar: the tar has changed" in out
    assert "train-000001.tar: the tar is gone" in out
    assert "1 of 3 entries agree" in out


def _age(cache):
    old = time.time() - 9 * 24 * 3600
    for path in Path(cache.url).rglob("*"):
        os.utime(path, (old, old))


def test_gc_removes_what_no_manifest_names(scored, spec, capsys):
    cache = scored.cache
    ids = load_samples(scored.shards, cache).shard_ids
    Path(scored.shards[0]).write_bytes(tar_bytes(photo_members(3, 70)))
    score([Path(scored.shards[0])], cache, spec)  # the old entry has no name any more
    main(Gc(cache.url))
    assert len(list(cache.entries())) == 4  # all are new: a job may be at work
    _age(cache)
    main(Gc(cache.url, dry_run=True))
    assert len(list(cache.entries())) == 4
    main(Gc(cache.url))
    assert f"{ids[0]}: " in capsys.readouterr().out
    assert {entry.shard_id for entry in cache.entries()} >= set(ids[1:])
    assert len(list(cache.entries())) == 3
    assert _images(scored.shards, cache, scored.spec) == 19


def _everything(cache):
    return {str(path) for path in Path(cache.url).rglob("*") if path.is_file()}


def test_gc_removes_the_staging_files_of_killed_writers(scored, capsys):
    cache = scored.cache
    before = _everything(cache)
    for place in (f"shards/{'e' * 32}/table.zip", f"datasets/x-{'e' * 12}/00000001.json"):
        done = subprocess.run([sys.executable, program_file("die_while_putting"), cache.url, place])
        assert done.returncode == -signal.SIGKILL
    left = {Path(name).name for name in _everything(cache) - before}
    assert left == {"table.zip#1", "00000001.json#1"}
    assert main(Gc(cache.url)) == 0
    assert len(_everything(cache) - before) == 2  # new ones may be a live writer's
    _age(cache)
    assert main(Gc(cache.url, dry_run=True)) == 0
    assert len(_everything(cache) - before) == 2
    assert main(Gc(cache.url)) == 0
    assert "a staging file" in capsys.readouterr().out
    assert _everything(cache) == before


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
    assert _images([str(scored.folder)], cache, scored.spec) == 16


def _gc_keeps_everything(cache, capsys):
    """A gc that can't tell whether the tars are gone: it says so, and leaves all as it is."""
    _age(cache)
    before = _everything(cache)
    assert main(Gc(cache.url)) == 1
    assert _everything(cache) == before
    error = capsys.readouterr().err
    assert "keep their scores. If the folder is gone for good, remove" in error
    assert (Path(cache.url) / error.split(f"{cache.url}/")[-1].split()[0]).is_dir()
    return error


@pytest.mark.parametrize("state", ["missing", "empty", "with a marker file"])
def test_gc_takes_a_disk_that_is_not_mounted_for_no_deletion(scored, capsys, state):
    away = scored.folder.rename(scored.folder.with_name("away"))
    if state != "missing":
        scored.folder.mkdir()
    if state == "with a marker file":
        (scored.folder / "NOT_MOUNTED").touch()
    assert str(scored.folder) in _gc_keeps_everything(scored.cache, capsys)
    shutil.rmtree(scored.folder, ignore_errors=True)
    away.rename(scored.folder)
    assert _images(scored.shards, scored.cache, scored.spec) == 26


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


def test_gc_takes_an_empty_bucket_of_that_name_elsewhere_for_no_deletion(
    scored, capsys, monkeypatch
):
    """Shards on one S3 endpoint, gc on a machine whose environment names another."""
    with serve(free_port()) as endpoint:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="images")
        records = scored.cache.manifests.read(str(scored.folder))
        scored.cache.manifests.publish({f"s3://images/{name}": r for name, r in records.items()})
        shutil.rmtree(scored.folder)
        assert "s3://images holds none" in _gc_keeps_everything(scored.cache, capsys)


def test_gc_looks_for_a_tar_in_the_root_of_the_file_system_there(scored, monkeypatch, tmp_path):
    (record, *_) = scored.cache.manifests.read(str(scored.folder)).values()
    name = next(iter(sorted(os.listdir("/"))))  # any that is there
    scored.cache.manifests.publish({f"/{name}": record})
    monkeypatch.chdir(tmp_path)
    _age(scored.cache)
    assert main(Gc(scored.cache.url)) == 0
    assert set(scored.cache.manifests.read("/")) == {name}


@pytest.mark.parametrize("inside", ["shards/train", "shards", "datasets"])
def test_a_cache_among_other_files_is_refused_and_gc_deletes_none(tmp_path, spec, inside, capsys):
    """`--shards data/shards/train --cache data`."""
    tars = tmp_path / "data" / inside
    tars.mkdir(parents=True)
    for name in ("train-0.tar", "notes#12"):
        (tars / name).write_bytes(tar_bytes(photo_members(2)))
    with pytest.raises(CacheError, match=r"is no part of a score cache.*another folder as --cache"):
        ScoreCache(str(tmp_path / "data"), create=True)
    cache = ScoreCache(str(tmp_path / "data"))  # one that was a cache before they came
    score([tars / "train-0.tar"], cache, spec)
    (tars / "train-0.tar").touch()
    _age(cache)
    before = _everything(cache)
    with pytest.raises(CacheError, match="is no part of a score cache"):
        main(Gc(cache.url))
    assert _everything(cache) == before


def test_show_draws_photos_beside_their_maps(scored, tmp_path):
    out = tmp_path / "maps.png"
    main(Show(scored.cache.url, scored.shards, out, images=3, spec=scored.spec))
    width, height = Image.open(out).size
    assert 0.5 < width / height < 0.8


def test_a_removed_entry_is_missed_by_name(scored, spec):
    (shard_id,) = load_samples(scored.shards[:1], scored.cache).shard_ids
    shutil.rmtree(Path(scored.cache.url) / "shards" / shard_id)
    with pytest.raises(CacheError, match="no maps of"):
        scored.cache.read_maps(shard_id, spec)
    with pytest.raises(CacheError, match=r"has no table of it.*famt score"):
        load_samples(scored.shards, ScoreCache(scored.cache.url), spec)


def test_stored_specs_are_known_again(spec):
    banded = dataclasses.replace(spec, kind="bandpass", band=(1.0, 5.0))
    assert ScoreSpec.from_description(banded.describe()) == banded
    assert ScoreSpec.from_description({**spec.describe(), "code_version": -1}) is None
