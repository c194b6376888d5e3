"""The same path on an object store: a real S3 API, by HTTP on loopback.

Stores that fail now and then, on seeds of one's own:

    FAMT_FUZZ_SEEDS=7,8 python -m pytest -s -m slow tests/pipeline/test_s3.py -k failing
"""

import json
import os
import re
import subprocess
import sys
import urllib.request
from datetime import timedelta
from pathlib import Path

import boto3
import pytest
from faulty_proxy import FAULTS
from launch import program_file
from s3_server import environment, free_port, serve
from samples import encode, photo

from famt.jobs.make_shards import main
from famt.jobs.options import MakeShards
from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.gc import collect
from famt.pipeline.caching.validity import look_up
from famt.pipeline.errors import CacheError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig
from famt.pipeline.scoring.precompute import precompute_shard
from famt.pipeline.scoring.publish import publish
from famt.pipeline.sharding.patterns import expand_shards
from famt.train.checkpoint import load
from famt.train.pretrain import Pretrain
from famt.train.pretrain import main as pretrain

ROOT = Path(__file__).parents[2]
SEEDS = [int(seed) for seed in os.environ.get("FAMT_FUZZ_SEEDS", "0").split(",")]


@pytest.fixture(scope="module")
def endpoint():
    with serve(free_port()) as url:
        yield url


@pytest.fixture
def bucket(endpoint, monkeypatch):
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
    boto3.client("s3").create_bucket(Bucket="images")
    return "s3://images"


@pytest.fixture
def shards(bucket, tmp_path):
    for n in range(20):
        path = tmp_path / "photos" / f"c{n % 3}" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(n)))
    main(MakeShards(str(tmp_path / "photos"), out=f"{bucket}/shards", samples_per_shard=8))
    return f"{bucket}/shards/train-{{000000..000002}}.tar"


def _score(urls, cache, spec):
    reports = [precompute_shard(url, cache, spec) for url in urls]
    assert publish(reports, cache, spec) == []
    return sum(report.decoded for report in reports)


def test_shards_and_cache_on_s3_feed_the_loader(bucket, shards, spec):
    urls = expand_shards([shards])
    assert urls == expand_shards([f"{bucket}/shards"]) == expand_shards([f"{bucket}/shards/t*.tar"])
    cache = ScoreCache(f"{bucket}/scores", create=True)
    assert _score(urls, cache, spec) == 20
    table = load_samples([shards], ScoreCache(f"{bucket}/scores"))
    config = LoaderConfig(batch_size=5, image_size=32, shuffle_buffer=8, threads=2)
    loader = CropLoader(table, config, drop_last=False)
    assert sorted(row for crops in loader for row in crops.rows.tolist()) == list(range(20))
    assert _score(urls, ScoreCache(f"{bucket}/scores"), spec) == 0  # a second run reuses it all


@pytest.mark.slow
def test_the_whole_path_runs_on_s3(bucket, shards, tmp_path):
    """Ray scores, training reads shards and scores, and a second experiment computes nothing."""
    command = [
        sys.executable, "jobs/precompute_freq.py", "--shards", shards,
        "--cache", f"{bucket}/scores", "--json",
    ]  # fmt: skip
    summaries = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        summaries.append(json.loads(done.stdout.splitlines()[-1]))
    assert [summary["decoded_now"] for summary in summaries] == [20, 0]
    config = Pretrain(
        shards=[shards], cache=f"{bucket}/scores", out=tmp_path / "run", model="vit_nano",
        epochs=2, batch_size=8, device="cpu",
    )  # fmt: skip
    pretrain(config)
    assert load(tmp_path / "run").step == 4


def test_a_replaced_object_is_found_by_its_etag(bucket, shards, spec):
    urls = expand_shards([shards])
    cache = ScoreCache(f"{bucket}/scores", create=True)
    _score(urls, cache, spec)
    client = boto3.client("s3")
    client.copy_object(
        Bucket="images", Key="shards/train-000001.tar", CopySource="images/shards/train-000002.tar"
    )
    assert set(look_up(urls, cache, spec).stale) == {urls[1]}
    # Its content is known under another name.
    assert len(load_maps(load_samples([shards], cache, spec), cache, spec)) == 16
    assert _score(urls, cache, spec) == 0


def test_versions_of_many_tars_are_listed_and_are_those_of_each(bucket, monkeypatch):
    client = boto3.client("s3")
    names = [f"train-{n:03d}.tar" for n in range(0, 120, 2)]
    others = ["a.tar", "train-0", "train-051.tar", "train-010.tar/deep.tar", "val-000.tar"]
    for number, name in enumerate([*names, *others]):
        client.put_object(Bucket="images", Key=f"far/shards/{name}", Body=bytes(number))
    urls = [f"{bucket}/far/shards/{name}" for name in names]
    expected = {url: storage.version(url) for url in urls}
    asked = [*urls[30:], f"{bucket}/far/shards/train-031.tar", *urls[:30]]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "version", None)
        assert storage.versions(asked) == expected
    assert storage.versions(asked[:10]) == {url: expected[url] for url in asked[:10]}


def test_what_no_manifest_names_is_collected_from_s3(bucket, shards, spec):
    urls = expand_shards([shards])
    cache = ScoreCache(f"{bucket}/scores", create=True)
    precompute_shard(urls[0], cache, spec)
    _score(urls[1:], cache, spec)
    removed = list(collect(cache, timedelta(0)))
    assert [each.reason for each in removed] == ["no manifest names it"]
    assert len(list(cache.entries())) == 2
    assert set(look_up(urls, cache, spec).stale) == {urls[0]}


def test_what_is_not_there_is_named(bucket, shards, spec):
    cache = ScoreCache(f"{bucket}/scores", create=True)
    with pytest.raises(CacheError, match="does not know this shard"):
        load_samples([shards], cache, spec)
    with pytest.raises(CacheError, match=r"train-000009\.tar: no such file"):
        load_samples([f"{bucket}/shards/train-000009.tar"], cache)
    with pytest.raises(FileNotFoundError, match="no such shards"):
        expand_shards([f"{bucket}/nothing-here"])
    assert not storage.exists(f"{bucket}/shards/train-000009.tar")


def _read_from_a_failing_store(*arguments):
    """Output of the program of that name: DALI keeps the endpoint that a process reads first."""
    return subprocess.run(
        [sys.executable, program_file("read_from_a_failing_store"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
    )


def test_a_failed_read_loses_and_repeats_no_sample():
    done = _read_from_a_failing_store("503-body", 40, 2, 0)
    assert done.returncode == 0, done.stderr
    batches, pipelines = re.findall(r"\d+", done.stdout)
    assert (batches, int(pipelines) > 0) == ("24", True)
    assert re.search(
        r"s3://images/\d\.tar, or another of \d tars: the store failed \(", done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_ten_epochs_over_a_failing_store_are_those_of_a_sound_one(fault, seed):
    done = _read_from_a_failing_store(fault, 60, 10, seed)
    print(f"{fault}, seed {seed}: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr


def test_a_store_that_keeps_failing_is_an_error_that_names_the_tar_and_the_remedy():
    done = _read_from_a_failing_store("503-body", 1, 1, 0)
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("OSError: s3://images/0.tar, or another of 2 tars: the store failed")
    assert "5 times in a row" in error
    assert "--stage <folder>" in error
