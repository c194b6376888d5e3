"""Training and refresh on one cluster of two nodes, one of which is lost again and again."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from ray_clusters import cluster, lose, processes
from runs import equal, log_events
from samples import score, write_shards

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.scores import ModelScoreSpec, ScoreSpec
from famt.pipeline.scoring.generation import generation_path, open_generation
from famt.pipeline.scoring.model_scores import score_images
from famt.train import checkpoint
from famt.train.signals.refresh_folder import Encoder, RefreshFolder


@pytest.fixture(scope="module")
def nodes():
    """A cluster whose head has three CPUs."""
    with cluster(3) as started:
        yield started


@pytest.fixture
def shards(tmp_path):
    """Six tars of 100 images, which take actors seconds."""
    return [str(path) for path in write_shards(tmp_path / "shards", *[100] * 6)]


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


class _Job:
    """A program on the cluster."""

    def __init__(self, command, nodes, folder):
        self._said, self._log = folder / "said", folder / "log"
        environment = {**os.environ, "RAY_ADDRESS": nodes.address}
        with open(self._said, "w") as said, open(self._log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def until(self, condition):
        for _ in range(9000):
            if condition():
                return
            assert self.process.poll() is None, "it ended before it was disturbed"
            time.sleep(0.02)
        raise TimeoutError

    def end(self):
        """What it says; Ray says more, before it and after."""
        assert self.process.wait(timeout=600) == 0, self._log.read_text()[-5000:]
        return self._said.read_text().splitlines()


@pytest.mark.slow
def test_a_training_and_the_refresh_beside_it_outlive_a_node_lost_during_each(
    nodes, shards, tmp_path
):
    cache, other, out = tmp_path / "cache", tmp_path / "other", tmp_path / "run"
    score(shards, ScoreCache(str(cache), create=True), ScoreSpec(grid=7))
    shutil.copytree(cache, other)
    node = nodes.add_node(num_cpus=3)
    with _Job(_train(shards, other, tmp_path / "undisturbed"), nodes, tmp_path) as job:
        job.end()
    with _Job(_train(shards, cache, out), nodes, tmp_path) as job:
        job.until(lambda: max(checkpoint.steps(out), default=0) > 7)  # in an epoch
        lose(nodes, node)
        node = nodes.add_node(num_cpus=3)
        # While the maps are made that both ranks wait for.
        job.until(lambda: RefreshFolder(out).encoder(18).exists() and _refreshes(node))
        lose(nodes, node)
        node = nodes.add_node(num_cpus=3)
        job.end()
    lose(nodes, node)
    calm, disturbed = checkpoint.load(tmp_path / "undisturbed"), checkpoint.load(out)
    assert calm.step == disturbed.step == 24
    assert calm.components["frequency"] == disturbed.components["frequency"] == {"generation": 18}
    assert equal(calm.model, disturbed.model)
    assert len(log_events(out, "start")) == 3


@pytest.mark.slow
def test_a_refresh_comes_to_its_end_on_the_nodes_that_are_left(nodes, shards, tmp_path):
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    score(shards, cache, ScoreSpec(grid=7))
    encoder = Encoder(
        run="run-a",
        step=7,
        sizes=dataclasses.asdict(MODELS["vit_nano"]),
        weights=MaskedAutoencoder(MODELS["vit_nano"]).encoder.state_dict(),
        config={"cache": cache.url, "precision": "fp32", "device": "cpu"},
        kinds=["token_frequency"],
        urls=shards,
    )
    checkpoint.write(tmp_path / "encoder.pt", encoder)
    node = nodes.add_node(num_cpus=3)
    command = [
        sys.executable, "jobs/refresh_scores.py", "--checkpoint", str(tmp_path / "encoder.pt"),
        "--batch-size", "1", "--cpus-per-worker", "2", "--out", str(tmp_path), "--json",
    ]  # fmt: skip
    with _Job(command, nodes, tmp_path) as job:
        job.until(lambda: _refreshes(node))
        lose(nodes, node)  # none comes in its place
        (summary,) = [json.loads(line) for line in job.end() if line.startswith("{")]
    assert (summary["failed"], summary["images"]) == ({}, 600)
    samples = load_samples(shards, cache)
    found = open_generation(generation_path(tmp_path, 7)).maps(samples, ["token_frequency"], 8)
    spec, cpu = ModelScoreSpec("token_frequency", 8, 32, ""), torch.device("cpu")
    expected = score_images(encoder.build(), samples, [spec], batch_size=50, threads=1, device=cpu)
    np.testing.assert_allclose(found["token_frequency"], expected[spec], atol=2e-3)
