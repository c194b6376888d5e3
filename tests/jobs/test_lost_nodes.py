"""Training and refresh on one cluster of two nodes, one of which is lost again and again."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
import torch
from ray_clusters import cluster, lose, processes
from samples import photo_members, score, tar_bytes

from pipeline.cache import ScoreCache
from pipeline.refresh import refresh_shards
from pipeline.scores import ScoreSpec
from pipeline.table import load_samples
from train import checkpoint
from train.signals.following import encoder_path


@pytest.fixture
def shards(tmp_path):
    """Six tars of 100 images, which take actors seconds."""
    (tmp_path / "shards").mkdir()
    for number in range(6):
        path = tmp_path / "shards" / f"{number}.tar"
        path.write_bytes(tar_bytes(photo_members(100, 100 * number)))
    return [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]


def _until(condition, job):
    for _ in range(9000):
        if condition():
            return
        assert job.poll() is None, "the job ended before it was disturbed"
        time.sleep(0.02)
    raise TimeoutError


def _refreshes(node):
    """Whether a node makes maps just now, by the title that Ray gives its process."""
    for process in processes(node):
        try:
            if "_Refresher.refresh" in " ".join(process.cmdline()):
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def _train(shards, cache, out):
    """Two ranks of two CPUs each: on nodes of three, one of them on each."""
    return [
        sys.executable, "jobs/pretrain.py", "--shards", *shards, "--cache", str(cache),
        "--out", str(out), "--model", "vit_nano", "--recipe", "famt-paper", "--plain-epochs", "1",
        "--refresh.every", "2", "--refresh.wait", "--epochs", "4", "--batch-size", "50",
        "--spec.grid", "7", "--log-steps", "1", "--checkpoint-minutes", "0", "--workers", "2",
        "--cpus-per-worker", "2", "--threads", "1", "--refresher.batch-size", "1",
    ]  # fmt: skip


@pytest.mark.slow
def test_training_and_refresh_come_to_their_end_though_a_node_is_lost_during_each(shards, tmp_path):
    cache, other, out = tmp_path / "cache", tmp_path / "other", tmp_path / "run"
    score(shards, ScoreCache(str(cache), create=True), ScoreSpec(grid=7))
    shutil.copytree(cache, other)
    with cluster(3) as nodes, ExitStack() as jobs:

        def start(command):
            environment = {**os.environ, "RAY_ADDRESS": nodes.address}
            with open(tmp_path / "said", "w") as said, open(tmp_path / "log", "w") as log:
                job = subprocess.Popen(command, env=environment, stdout=said, stderr=log)
            jobs.callback(job.kill)
            return job

        def end(job):
            assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-5000:]

        node = nodes.add_node(num_cpus=3)
        end(start(_train(shards, other, tmp_path / "undisturbed")))

        job = start(_train(shards, cache, out))
        _until(lambda: max(checkpoint.steps(out), default=0) > 7, job)  # in an epoch
        lose(nodes, node)
        node = nodes.add_node(num_cpus=3)
        # While the maps are made that both ranks wait for.
        _until(lambda: encoder_path(out, 18).exists() and _refreshes(node), job)
        lose(nodes, node)
        node = nodes.add_node(num_cpus=3)
        end(job)
        calm, disturbed = checkpoint.load(tmp_path / "undisturbed"), checkpoint.load(out)
        assert calm.step == disturbed.step == 24
        assert calm.signals == disturbed.signals == {"content": {"generation": 18}}
        assert all(torch.equal(calm.model[name], disturbed.model[name]) for name in calm.model)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [each.get("event") for each in lines].count("start") == 3

        refresh = [
            sys.executable, "jobs/refresh_scores.py", "--checkpoint", str(out),
            "--kinds", "token_frequency", "--batch-size", "1", "--cpus-per-worker", "2",
        ]  # fmt: skip
        job = start(refresh)
        _until(lambda: _refreshes(node), job)
        lose(nodes, node)  # none comes in its place
        end(job)
        summary = json.loads((tmp_path / "said").read_text().splitlines()[-1])
        assert (summary["failed"], summary["images"]) == ({}, 600)

    made = ScoreCache(str(cache))
    (spec,) = made.generations.of(disturbed.run)[-1].specs
    found = np.concatenate(made.read_maps(load_samples(shards, made).shard_ids, spec))
    ranks = ScoreCache(str(other))
    encoder = checkpoint.load_encoder(out).build()
    cpu = torch.device("cpu")
    list(refresh_shards(encoder, shards, ranks, [spec], batch_size=50, threads=1, device=cpu))
    expected = np.concatenate(ranks.read_maps(load_samples(shards, ranks).shard_ids, spec))
    np.testing.assert_allclose(found, expected, atol=2e-3)
