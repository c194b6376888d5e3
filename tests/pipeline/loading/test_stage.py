import contextlib
import os
import random
import shutil
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
import staging
from s3_server import environment, free_port, serve
from samples import encode, score, tar_bytes

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.loading import stage
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader, own_share
from famt.pipeline.loading.stage import stage_shards
from famt.pipeline.options import LoaderConfig
from famt.pipeline.sharding.shards import content_id

KILLS = int(os.environ.get("FAMT_STAGE_KILLS", "20"))


def test_staged_tars_are_the_shards_and_feed_the_loader(scored, table, tmp_path):
    staged = stage_shards(table, scored.cache, tmp_path / "fast" / "disk", show=True)
    assert (staged.urls, staged.digest) == (table.urls, table.digest)
    for path, url, shard_id in zip(staged.paths, table.urls, table.shard_ids, strict=True):
        assert Path(path).read_bytes() == Path(url).read_bytes()
        assert Path(path).name == f"{shard_id}.tar"
    assert len(os.listdir(tmp_path / "fast" / "disk")) == 3
    config = LoaderConfig(4, image_size=32, shuffle_buffer=8, threads=1)
    here, there = (
        [crops.images for crops in CropLoader(each, config, drop_last=True, seed=1)]
        for each in (staged, table)
    )
    assert all((a == b).all() for a, b in zip(here, there, strict=True))


def test_what_is_there_is_not_read_again_whoever_put_it(scored, table, tmp_path):
    first = stage_shards(table, scored.cache, tmp_path / "disk").paths
    times = [Path(path).stat().st_mtime_ns for path in first]
    assert stage_shards(table, scored.cache, tmp_path / "disk").paths == first
    renamed = tmp_path / "renamed"
    shutil.copytree(scored.folder, renamed)
    os.rename(renamed / "train-000000.tar", renamed / "other.tar")
    other = load_samples([str(renamed)], scored.cache)
    assert set(stage_shards(other, scored.cache, tmp_path / "disk").paths) == set(first)
    assert [Path(path).stat().st_mtime_ns for path in first] == times


@pytest.mark.parametrize("left", ["a piece", "zeros", "too much", "all"])
def test_what_a_killed_run_left_is_gone_on_with_if_it_is_sound(scored, table, tmp_path, left):
    disk = tmp_path / "disk"
    disk.mkdir()
    data = Path(table.urls[1]).read_bytes()
    piece = {
        "a piece": data[:5000],
        "zeros": bytes(5000),
        "too much": data + b"more",
        "all": data,
    }[left]
    (disk / f"{table.shard_ids[1]}.tar.part").write_bytes(piece)
    paths = stage_shards(table, scored.cache, disk).paths
    assert Path(paths[1]).read_bytes() == data
    assert sorted(os.listdir(disk)) == sorted(f"{each}.tar" for each in table.shard_ids)


def test_a_machine_fetches_the_tars_that_its_ranks_read(scored, table, tmp_path):
    own = [own_share(26, rank, 4) for rank in (2, 3)]  # of 10, 7 and 9 rows
    staged = stage_shards(table, scored.cache, tmp_path / "disk", own)
    assert staged.paths[0] == table.urls[0]
    assert sorted(os.listdir(tmp_path / "disk")) == sorted(
        f"{each}.tar" for each in table.shard_ids[1:]
    )
    Path(table.urls[1]).unlink()
    Path(table.urls[2]).unlink()
    config = LoaderConfig(4, image_size=32, threads=1)
    rows = [
        row
        for rank in (2, 3)
        for crops in CropLoader(staged, config, drop_last=False, rank=rank, world_size=4)
        for row in crops.rows.tolist()
    ]
    assert sorted(rows) == list(range(13, 26))


def test_a_tar_of_another_size_under_a_staged_name_is_not_used(scored, table, tmp_path):
    paths = stage_shards(table, scored.cache, tmp_path).paths
    Path(paths[0]).write_bytes(b"cut")
    stage_shards(table, scored.cache, tmp_path)
    assert Path(paths[0]).read_bytes() == Path(table.urls[0]).read_bytes()


def test_other_bytes_than_those_that_were_scored_are_refused_by_name(scored, table, tmp_path):
    data = bytearray(Path(table.urls[2]).read_bytes())
    data[700] ^= 1
    Path(table.urls[2]).write_bytes(data)
    with pytest.raises(CacheError, match=r"train-000002.tar: its bytes are not those that were"):
        stage_shards(table, scored.cache, tmp_path / "disk")
    assert f"{table.shard_ids[2]}.tar" not in os.listdir(tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*.part"))


def test_a_disk_that_is_too_small_is_refused_with_the_sizes(scored, table, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"3 tars .* need 0\.\d GB, and 0\.0 GB are free"):
        stage_shards(table, scored.cache, tmp_path / "disk")
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


def _bytes(folder):
    """What is there of all tars, fetched and in the making."""
    sizes = 0
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # it just got its name
            sizes += (folder / name).stat().st_size
    return sizes


@pytest.mark.slow
def test_staging_killed_at_random_goes_on_and_never_names_a_half(on_s3, tmp_path):
    cache, shards = on_s3
    disk = tmp_path / "disk"
    disk.mkdir()
    table = load_samples(shards, cache)
    rng = random.Random(0)
    total = sum(record.version.size for record in cache.manifests.lookup(shards).values())
    whole: dict[str, tuple[int, int]] = {}
    parts: dict[str, int] = {}
    halves = rounds = 0
    for _ in range(KILLS):
        both = [staging.start(table, cache, disk) for _ in range(2)]  # two ranks of a machine
        wanted = rng.uniform(_bytes(disk), total)
        while _bytes(disk) < wanted and any(each.is_alive() for each in both):
            time.sleep(0.001)
        for each in both:
            each.kill()
        for each in both:
            each.join()
        for path in disk.glob("*.tar"):
            assert content_id(path.read_bytes()) == path.stem  # no half under a whole's name
            now = path.stat().st_ino, path.stat().st_mtime_ns
            assert whole.setdefault(path.name, now) == now  # not fetched twice
        assert whole.keys() <= set(os.listdir(disk))
        for path in disk.glob("*.part"):
            size = path.stat().st_size
            if path.stem not in whole:
                assert size >= parts.get(path.stem, 0)  # gone on with, not begun again
                parts[path.stem] = size
        halves += any(disk.glob("*.part"))
        if len(whole) == len(shards):  # all are there: begin anew
            shutil.rmtree(disk)
            disk.mkdir()
            whole, parts, rounds = {}, {}, rounds + 1
    print(f"{KILLS} kills, {halves} of them in the midst of a tar; all were whole {rounds} times")
    assert halves
    both = [staging.start(table, cache, disk) for _ in range(2)]
    for each in both:
        each.join(120)
        assert each.exitcode == 0
    assert sorted(os.listdir(disk)) == sorted(f"{each}.tar" for each in table.shard_ids)
    for path in disk.iterdir():
        assert content_id(path.read_bytes()) == path.stem
        now = path.stat().st_ino, path.stat().st_mtime_ns
        assert whole.get(path.name, now) == now
