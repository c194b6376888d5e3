import dataclasses
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import boto3
import numpy as np
import pytest
import ray
from launch import until
from s3_server import environment, free_port, serve
from samples import photo_members, tar_bytes, write_shards

from famt.jobs.options import PrecomputeFreq
from famt.jobs.precompute_freq import main
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.gc import collect
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.scoring.precompute import precompute_shard, score_shard
from famt.pipeline.scoring.publish import publish
from famt.pipeline.sharding.shards import Rejected, content_id

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path / "shards", 5, 5, 5)
    return tmp_path / "shards"


def _config(shards, tmp_path, spec, **options):
    where = {"shards": [str(shards)], "cache": str(tmp_path / "cache"), "spec": spec}
    return PrecomputeFreq(**{**where, "json": True, **options})


@pytest.fixture
def run(cluster, shards, tmp_path, spec, capsys):
    """Run a job on the shards; gives its exit code, its summary, and what it says on stderr."""

    def job(**options):
        code = main(_config(shards, tmp_path, spec, **options))
        out, err = capsys.readouterr()
        return code, json.loads(out.strip().splitlines()[-1]), err

    return job


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_job_scores_everything_once(run, shards, tmp_path, spec, capsys):
    code, first, _ = run(summary=str(tmp_path / "summary.json"))
    assert (code, first["shards"], first["scored_now"]) == (0, 3, 3)
    assert (first["kept"], first["quarantined"], first["decoded_now"]) == (15, 0, 15)
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    cache = ScoreCache(str(tmp_path / "cache"))
    maps = load_maps(load_samples([str(shards)], cache), cache, spec)
    expected = [score_shard(path.read_bytes(), spec).maps for path in sorted(shards.glob("*.tar"))]
    np.testing.assert_array_equal(maps.numpy(), np.concatenate(expected))
    before = _files(tmp_path / "cache")
    code, again, _ = run()
    assert (code, again["scored_now"]) == (0, 0)
    assert main(_config(shards, tmp_path, spec, json=False)) == 0
    assert capsys.readouterr().out.endswith("nothing to score; 15 can be trained on\n")
    assert _files(tmp_path / "cache") == before


def test_files_that_are_no_images_are_counted_and_never_count_as_bad(run, shards):
    others = [(f"img{n:04d}.index.cls", b"0") for n in range(15, 18)] + [("a.gif", b"x")]
    (shards / "train-000003.tar").write_bytes(tar_bytes([*photo_members(5, 15), *others]))
    for _ in range(2):  # scored, and found in the cache
        code, summary, err = run(max_bad=0)
        assert (code, summary["kept"], summary["quarantined"]) == (0, 20, 0)
        assert err.count("passed over in the shards: 3 .cls, 1 .gif; images are files of") == 1


def test_what_a_collection_took_before_it_was_published_is_made_again(
    run, shards, tmp_path, spec, monkeypatch
):
    """An older job left scores that no manifest names; gc comes after this job found them."""
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    for path in shards.glob("*.tar"):
        precompute_shard(str(path), cache, spec)
    before = _files(tmp_path / "cache")
    took = []

    def collect_first(reports, cache, spec):
        if not took:
            took.extend(collect(cache, timedelta(0)))
        return publish(reports, cache, spec)

    monkeypatch.setattr("famt.pipeline.scoring.publish.publish", collect_first)
    code, summary, _ = run()
    assert (code, len(took), summary["decoded_now"]) == (0, 3, 15)
    assert _files(tmp_path / "cache").items() >= before.items()


def test_only_what_changed_is_scored_again(run, shards, tmp_path):
    run()
    (shards / "train-000001.tar").write_bytes(tar_bytes(photo_members(4, 100)))
    (shards / "copy.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    code, again, _ = run()
    assert (code, again["scored_now"], again["decoded_now"], again["kept"]) == (0, 2, 4, 19)
    assert len(load_samples([str(shards)], ScoreCache(str(tmp_path / "cache")))) == 19


def test_bad_images_are_named_and_too_many_fail_the_job(run, shards):
    bad = [("broken.jpg", b"garbage"), *photo_members(9, 50)]
    (shards / "train-000009.tar").write_bytes(tar_bytes(bad))
    code, _, err = run(max_bad=0.05)
    assert code == 0
    assert "train-000009.tar:broken: it is not a JPEG" in err
    code, _, err = run(max_bad=0.02)
    assert code == 1
    assert "share than --max-bad" in err


def test_a_tar_that_cannot_be_scored_fails_alone(run, shards):
    (shards / "train-000008.tar").write_bytes(b"no tar at all" * 100)
    code, summary, _ = run()
    assert (code, summary["kept"]) == (1, 15)
    ((url, reason),) = summary["failed"].items()
    assert url.endswith("train-000008.tar")
    assert "no image in it" in reason


def test_a_cut_tar_is_reported_by_every_run_and_its_whole_samples_kept(run, shards):
    whole = (shards / "train-000002.tar").read_bytes()
    (shards / "train-000002.tar").write_bytes(whole[: len(whole) // 3])
    for scored_now in (3, 0):
        code, summary, err = run(max_bad=1.0)
        assert (code, summary["scored_now"]) == (1, scored_now)
        assert f"damaged: {shards}/train-000002.tar: " in err
        assert "--max-damaged" in err
        assert list(summary["damaged"]) == [f"{shards}/train-000002.tar"]
        assert 10 < summary["kept"] < 15
    assert run(max_bad=1.0, max_damaged=1)[0] == 0


def test_what_was_quarantined_is_judged_again_on_demand(run, shards, tmp_path, spec):
    path = str(shards / "train-000000.tar")
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    judged = score_shard(Path(path).read_bytes(), spec)
    earlier = dataclasses.replace(  # as a decoder of other days may have left it
        judged.table,
        key=judged.table.key[1:],
        samples=judged.table.samples[1:],
        rejected=[Rejected("img0000", "not to its taste")],
    )
    shard_id = content_id(Path(path).read_bytes())
    cache.write(shard_id, earlier, spec, judged.maps[1:])
    code, summary, _ = run()
    assert (code, summary["quarantined"]) == (1, 1)
    before = load_samples([str(shards)], cache)
    code, summary, _ = run(retry_bad=True)
    assert (code, summary["kept"], summary["quarantined"]) == (0, 15, 0)
    assert summary["decoded_now"] == 15
    after = load_samples([str(shards)], cache)
    assert (len(before), len(after)) == (14, 15)
    assert before.digest != after.digest
    assert len(load_maps(after, cache, spec)) == 15
    assert cache.read_table(shard_id).key == earlier.key  # whoever goes by it still can
    code, summary, _ = run()
    assert (code, summary["scored_now"]) == (0, 0)


@pytest.mark.parametrize("inside", ["shards", "shards/cache"])
def test_a_cache_among_the_tars_is_refused(shards, tmp_path, spec, inside):
    config = PrecomputeFreq([str(shards)], str(tmp_path / inside), spec)
    with pytest.raises(
        UserError, match=rf"lies in {shards}, a folder of shards; choose one outside"
    ):
        main(config)
    assert sorted(each.suffix for each in shards.iterdir()) == [".tar"] * 3


@pytest.mark.parametrize("watch", ["soon", "10", "m", "5 m", "-1s"])
def test_a_watch_without_a_time_is_refused(tmp_path, spec, watch):
    with pytest.raises(UserError, match="30s, 10m or 2h"):
        _config(tmp_path, tmp_path, spec, watch=watch)


def test_a_watch_does_not_judge_all_images_again_at_each_look(tmp_path, spec):
    with pytest.raises(UserError, match="--retry-bad and --watch"):
        _config(tmp_path, tmp_path, spec, watch="1m", retry_bad=True)


def _wait_for(images, shards, cache):
    """Until that many images are ready for training."""

    def ready():
        try:
            return len(load_samples(shards, cache)) == images
        except (CacheError, FileNotFoundError):
            return False

    until(ready, seconds=600)


@pytest.mark.slow
def test_a_watch_takes_up_what_is_new_or_changed_and_training_sees_it_at_its_start(
    shards, tmp_path
):
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    command = [
        sys.executable, "jobs/precompute_freq.py", "--shards", str(shards), "--cache", cache.url,
        "--spec.grid", "7", "--watch", "1s",
    ]  # fmt: skip

    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        _wait_for(15, [str(shards)], cache)
        (shards / "train-new.tar").write_bytes(tar_bytes(photo_members(3, 200)))
        _wait_for(18, [str(shards)], cache)
        (shards / "train-000000.tar").write_bytes(tar_bytes(photo_members(2, 300)))
        _wait_for(15, [str(shards)], cache)
    finally:
        job.terminate()
        job.wait()


@pytest.mark.slow
def test_a_watch_outlives_an_outage_of_the_store(tmp_path, monkeypatch):
    """Shards and cache on S3. The store goes while shards are scored, comes back without a bucket,
    and then with shards."""
    port = free_port()
    for name, value in environment(f"http://127.0.0.1:{port}").items():
        monkeypatch.setenv(name, value)
    command = [
        sys.executable, "jobs/precompute_freq.py", "--shards", "s3://images/shards",
        "--cache", "s3://images/scores", "--spec.grid", "7", "--watch", "1s",
    ]  # fmt: skip

    def fill(shards):
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for number in range(shards):
            body = tar_bytes(photo_members(5, 5 * number))
            client.put_object(Bucket="images", Key=f"shards/{number}.tar", Body=body)

    def wait_for_line(text, after):
        until(lambda: job.poll() is not None or text in log.read_text()[after:], seconds=600)
        assert job.poll() is None, log.read_text()
        return len(log.read_text())

    log = tmp_path / "log"
    with open(log, "w") as file, serve(port):
        fill(shards=2)
        cache = ScoreCache("s3://images/scores")
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        _wait_for(10, ["s3://images/shards"], cache)
        fill(shards=40)
        until(lambda: len(list(cache.entries())) >= 10)
    try:
        end = wait_for_line("error sending request; trying again", len(log.read_text()))
        end = wait_for_line("can't be listed", end)
        with serve(port):
            end = wait_for_line("NoSuchBucket", end)
            fill(shards=3)
            _wait_for(15, ["s3://images/shards"], cache)
            wait_for_line("3 shards, 3 scored before", end)
    finally:
        job.terminate()
        job.wait()
