import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from launch import program_file
from s3_server import environment, free_port, serve
from samples import encode, score, tar_bytes

from pipeline import stage
from pipeline.cache import ScoreCache
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.manifest import CacheError
from pipeline.shards import content_id
from pipeline.stage import stage_shards
from pipeline.table import load_samples

KILLS = int(os.environ.get("FAMT_STAGE_KILLS", "20"))


def _samples(scored):
    return load_samples(scored.shards, scored.cache)


def test_staged_tars_are_the_shards_and_feed_the_loader(scored, tmp_path):
    samples = _samples(scored)
    paths = stage_shards(samples, scored.cache, tmp_path / "fast" / "disk", show=True)
    for path, url, shard_id in zip(paths, samples.urls, samples.shard_ids, strict=True):
        assert Path(path).read_bytes() == Path(url).read_bytes()
        assert Path(path).name == f"{shard_id}.tar"
    assert len(os.listdir(tmp_path / "fast" / "disk")) == 3
    config = LoaderConfig(4, image_size=32, shuffle_buffer=8, threads=1)
    here, there = (
        [crops.images for crops in CropLoader(samples, config, drop_last=True, paths=each, seed=1)]
        for each in (paths, None)
    )
    assert all((a == b).all() for a, b in zip(here, there, strict=True))


def test_what_is_there_is_not_read_again_whoever_put_it(scored, tmp_path):
    samples = _samples(scored)
    first = stage_shards(samples, scored.cache, tmp_path / "disk")
    times = [Path(path).stat().st_mtime_ns for path in first]
    assert stage_shards(samples, scored.cache, tmp_path / "disk") == first
    renamed = tmp_path / "renamed"
    shutil.copytree(scored.folder, renamed)
    os.rename(renamed / "train-000000.tar", renamed / "other.tar")
    other = load_samples([str(renamed)], scored.cache)
    assert set(stage_shards(other, scored.cache, tmp_path / "disk")) == set(first)
    assert [Path(path).stat().st_mtime_ns for path in first] == times


@pytest.mark.parametrize("left", ["a piece", "zeros", "too much", "all"])
def test_what_a_killed_run_left_is_gone_on_with_if_it_is_sound(scored, tmp_path, left):
    samples, disk = _samples(scored), tmp_path / "disk"
    disk.mkdir()
    data = Path(samples.urls[1]).read_bytes()
    piece = {
        "a piece": data[:5000],
        "zeros": bytes(5000),
        "too much": data + b"more",
        "all": data,
    }[left]
    (disk / f"{samples.shard_ids[1]}.tar.part").write_bytes(piece)
    paths = stage_shards(samples, scored.cache, disk)
    assert Path(paths[1]).read_bytes() == data
    assert sorted(os.listdir(disk)) == sorted(f"{each}.tar" for each in samples.shard_ids)


def test_a_tar_of_another_size_under_a_staged_name_is_not_used(scored, tmp_path):
    samples = _samples(scored)
    paths = stage_shards(samples, scored.cache, tmp_path)
    Path(paths[0]).write_bytes(b"cut")
    stage_shards(samples, scored.cache, tmp_path)
    assert Path(paths[0]).read_bytes() == Path(samples.urls[0]).read_bytes()


def test_other_bytes_than_those_that_were_scored_are_refused_by_name(scored, tmp_path):
    samples = _samples(scored)
    data = bytearray(Path(samples.urls[2]).read_bytes())
    data[700] ^= 1
    Path(samples.urls[2]).write_bytes(data)
    with pytest.raises(CacheError, match=r"train-000002.tar: its bytes are not those that were"):
        stage_shards(samples, scored.cache, tmp_path / "disk")
    assert f"{samples.shard_ids[2]}.tar" not in os.listdir(tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*.part"))


def test_a_disk_that_is_too_small_is_refused_with_the_sizes(scored, tmp_path, monkeypatch):
    samples = _samples(scored)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"3 tars .* need 0\.\d GB, and 0\.0 GB are free"):
        stage_shards(samples, scored.cache, tmp_path / "disk")
    assert not os.listdir(tmp_path / "disk")


@pytest.fixture
def on_s3(tmp_path, spec, monkeypatch):
    """Six tars of 1 MB on S3, and a cache that knows them."""
    with serve(free_port()) as endpoint:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="images")
        cache = ScoreCache(str(tmp_path / "cache"), create=True)
        rng = np.random.default_rng(0)
        shards = []
        for n in range(6):
            noise = rng.integers(0, 256, (600, 580, 3), dtype=np.uint8)
            data = tar_bytes([(f"{n}.png", encode(noise, "PNG"))])
            boto3.client("s3").put_object(Bucket="images", Key=f"{n}.tar", Body=data)
            shards.append(f"s3://images/{n}.tar")
        score(shards, cache, spec)
        yield cache, shards


def _stage(cache, folder, shards):
    command = [sys.executable, program_file("stage_shards"), cache.url, str(folder), *shards]
    staging = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert staging.stdout.readline() == "begins\n"
    return staging


@pytest.mark.slow
def test_staging_killed_at_random_goes_on_and_never_names_a_half(on_s3, tmp_path):
    cache, shards = on_s3
    disk = tmp_path / "disk"
    samples = load_samples(shards, cache)
    whole: dict[str, tuple[int, int]] = {}
    parts: dict[str, int] = {}
    random.seed(0)
    other = _stage(cache, tmp_path / "other", shards)
    began = time.monotonic()
    assert other.wait(timeout=300) == 0
    usual, halves = time.monotonic() - began, 0
    for _ in range(KILLS):
        if len(whole) == len(shards):  # all are there: begin anew
            for name in whole:
                (disk / name).unlink()
            whole.clear()
        both = [_stage(cache, disk, shards) for _ in range(2)]  # two ranks of a machine
        time.sleep(random.uniform(0, 2) * usual)
        for each in both:
            each.kill()
            each.wait()
        for path in disk.glob("*.tar"):
            assert content_id(path.read_bytes()) == path.stem  # no half under a whole's name
            now = path.stat().st_ino, path.stat().st_mtime_ns
            assert whole.setdefault(path.name, now) == now  # not fetched twice
            parts.pop(path.name, None)
        halves += 0 < len(whole) < len(shards) or any(disk.glob("*.part"))
        for path in disk.glob("*.part"):
            if path.stem not in whole:
                size = path.stat().st_size
                assert size >= parts.get(path.stem, 0)  # gone on with, not begun again
                parts[path.stem] = size
    both = [_stage(cache, disk, shards) for _ in range(2)]
    for each in both:
        out, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors
        assert [Path(path).stem for path in out.split()] == samples.shard_ids
    assert halves  # else no kill came while tars were fetched
    assert sorted(os.listdir(disk)) == sorted(f"{each}.tar" for each in samples.shard_ids)
    for path in disk.iterdir():
        assert content_id(path.read_bytes()) == path.stem
        assert whole.get(path.name, (path.stat().st_ino, path.stat().st_mtime_ns)) == (
            path.stat().st_ino, path.stat().st_mtime_ns,
        )  # fmt: skip


def test_a_run_reads_what_it_staged(on_s3, tmp_path):
    cache, shards = on_s3
    samples = load_samples(shards, cache)
    paths = stage_shards(samples, cache, tmp_path / "disk")
    config = LoaderConfig(3, image_size=16, shuffle_buffer=0, threads=1)
    loader = CropLoader(samples, dataclasses.replace(config), drop_last=True, paths=paths)
    boto3.client("s3").delete_object(Bucket="images", Key="5.tar")
    assert sorted(row for crops in loader for row in crops.rows.tolist()) == list(range(6))
