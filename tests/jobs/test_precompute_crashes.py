"""The cache under kills, concurrency and disks that refuse."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from ray_clusters import cluster, lose
from samples import write_shards

from famt.jobs.options import PrecomputeFreq
from famt.jobs.precompute_freq import main
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheFullError, UserError
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import precompute_shard

ROOT = Path(__file__).parents[2]


IMAGES = 12 * 60


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As Ray's workers: with more threads sums differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Photos large enough that a job takes seconds."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, *[60] * 12, height=600, width=800)
    return folder


@pytest.fixture(scope="module")
def clean(shards, tmp_path_factory):
    """What a cache looks like if nothing goes wrong."""
    cache = ScoreCache(str(tmp_path_factory.mktemp("clean")), create=True)
    for path in sorted(shards.glob("*.tar")):
        precompute_shard(str(path), cache, ScoreSpec(grid=7))
    return cache


def _command(shards, cache):
    return [
        sys.executable, "jobs/precompute_freq.py", "--shards", str(shards), "--cache", str(cache),
        "--spec.grid", "7",
    ]  # fmt: skip


def _entries(cache):
    root = Path(cache) / "shards"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _victims(job, kind):
    """Processes of the job's own Ray: the driver, its raylet, or a worker in a task."""
    if kind == "driver":
        return [psutil.Process(job.pid)]
    wanted = "raylet/raylet" if kind == "raylet" else "ray::_score"
    return [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if wanted in " ".join(process.cmdline())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("FAMT_KILLS", "3"))))
def test_a_kill_at_any_moment_only_costs_the_work_in_hand(shards, clean, tmp_path, spec, seed):
    chance = random.Random(seed)
    kind = ("worker", "driver", "raylet")[seed % 3]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            _command(shards, tmp_path / "cache"), cwd=ROOT, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        wanted = chance.randrange(5)
        killed = False
        while job.poll() is None and not killed:
            done = len(list((tmp_path / "cache" / "shards").glob("*/table.zip")))
            if done >= wanted:
                time.sleep(chance.random() * 0.2)
                try:
                    for victim in _victims(job, kind):
                        victim.kill()
                        killed = True
                except psutil.Error:
                    pass
            time.sleep(0.01)
        try:
            job.wait(60 if kind == "worker" else 5)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)  # a driver without its raylet may wait for ever
        job.wait()
        for process in psutil.process_iter():  # what an orphaned cluster left
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == job.pid:
                    process.kill()
    assert killed, (tmp_path / "log").read_text()[-2000:]
    done = subprocess.run(_command(shards, tmp_path / "cache"), cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert _entries(tmp_path / "cache") == _entries(clean.url)
    assert len(load_samples([str(shards)], ScoreCache(str(tmp_path / "cache")))) == IMAGES


@pytest.mark.slow
def test_two_jobs_on_one_cache_at_once_lose_nothing(shards, tmp_path, spec):
    """One on all shards, one on some of them and on a folder of its own."""
    other = tmp_path / "other"
    write_shards(other, 30, 30, 30, 30)
    commands = [
        _command(shards, tmp_path / "cache"),
        [*_command(f"{shards}/train-00000*.tar", tmp_path / "cache")[:4], str(other),
         *_command(f"{shards}/train-00000*.tar", tmp_path / "cache")[3:]],
    ]  # fmt: skip
    jobs = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.DEVNULL) for c in commands]
    assert [job.wait() for job in jobs] == [0, 0]
    cache = ScoreCache(str(tmp_path / "cache"))
    assert len(load_samples([str(shards)], cache)) == IMAGES
    assert len(load_samples([str(other)], cache)) == 120
    clean = ScoreCache(str(tmp_path / "clean"), create=True)
    for path in [*shards.glob("*.tar"), *other.glob("*.tar")]:
        precompute_shard(str(path), clean, spec)
    assert _entries(cache.url) == _entries(clean.url)


def test_many_writers_of_one_shard_write_one_entry(shards, tmp_path, spec):
    url = str(shards / "train-000000.tar")
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: precompute_shard(url, ScoreCache(cache.url), spec), range(8)))
    clean = ScoreCache(str(tmp_path / "clean"), create=True)
    precompute_shard(url, clean, spec)
    assert _entries(cache.url) == _entries(clean.url)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 100 KB, mounted; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_readable(shards, small_disk, spec):
    cache = ScoreCache(str(small_disk / "cache"), create=True)
    written = []

    def fill():
        for path in sorted(shards.glob("*.tar")):
            written.append(precompute_shard(str(path), cache, spec))

    with pytest.raises(CacheFullError, match=rf"{cache.url} is full \(No space left.* gc --cache"):
        fill()
    assert 0 < len(written) < 12
    whole = [entry for entry in cache.entries() if entry.table and entry.specs]
    assert {entry.shard_id for entry in whole} == {report.shard_id for report in written}
    for report in written:
        assert len(cache.read_maps(report.shard_id, spec)) == 60


@pytest.mark.slow
def test_a_job_on_a_full_disk_fails_and_finishes_when_there_is_room(shards, small_disk, spec):
    command = _command(shards, small_disk / "cache")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "No space left" in line]
    assert len(said) == 1
    assert said[0].startswith(f"error: the score cache {small_disk}/cache is full")
    assert "failed: " not in done.stderr
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    subprocess.run(command, cwd=ROOT, check=True)
    assert len(load_samples([str(shards)], ScoreCache(str(small_disk / "cache")))) == IMAGES


def test_a_read_only_cache_is_a_clear_error(shards, small_disk, spec):
    cache = ScoreCache(str(small_disk / "cache"), create=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"could not write [\s\S]*Read-only"):
        precompute_shard(str(shards / "train-000000.tar"), cache, spec)
    with pytest.raises(UserError, match=rf"{cache.url} is not writable; choose another"):
        main(PrecomputeFreq([str(shards)], cache.url, spec=spec))


@pytest.mark.slow
def test_a_node_lost_in_mid_job_costs_only_time(shards, clean, tmp_path, spec):
    """Two Ray nodes on this machine; the one without the driver is killed while it works."""
    with cluster(1) as nodes:
        lost = nodes.add_node(num_cpus=1)
        job = subprocess.Popen(
            _command(shards, tmp_path / "cache"), cwd=ROOT, stdout=subprocess.DEVNULL,
            env={**os.environ, "RAY_ADDRESS": nodes.address},
        )  # fmt: skip
        while len(list((tmp_path / "cache" / "shards").glob("*/table.zip"))) < 3:
            assert job.poll() is None
            time.sleep(0.05)
        lose(nodes, lost)
        assert job.wait(180) == 0
    assert len(load_samples([str(shards)], ScoreCache(str(tmp_path / "cache")))) == IMAGES
    assert _entries(tmp_path / "cache") == _entries(clean.url)
