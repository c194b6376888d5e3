import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import equal, log_events

from jobs.pretrain import RayPretrain, worker_resources
from jobs.refresh_workers import RefreshWorkers
from train import checkpoint
from train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig


def _workers(job):
    """Processes of a job's Ray Train workers, as Ray titles them."""
    return [
        process.pid
        for process in psutil.Process(job.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def _command(scored, out, *more):
    return [
        sys.executable, "jobs/pretrain.py", "--shards", *scored.shards, "--cache", scored.cache.url,
        "--out", str(out), "--recipe", "famt", "--model", "vit_nano", "--epochs", "8",
        "--batch-size", "4", "--spec.grid", "7", "--log-steps", "1", "--checkpoint-minutes", "0",
        "--workers", "2", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_ray_train_survives_a_killed_worker_with_the_same_weights(scored, tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        _command(scored, whole), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        _command(scored, killed), env=environment, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (killed.exists() and checkpoint.latest(killed)):
        time.sleep(0.02)
    os.kill(_workers(process)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert len(log_events(killed, "start")) == 2
    first, second = checkpoint.load(whole), checkpoint.load(killed)
    assert first.step == second.step == 24
    assert first.config["world_size"] == 2
    assert equal(first.model, second.model)


@pytest.mark.slow
def test_a_mistake_ends_the_run_at_the_first_try_and_its_reason_is_the_last_word(scored, tmp_path):
    command = _command(scored, tmp_path / "run", "--batch-size", "400")
    done = subprocess.run(
        command, env={**os.environ, "RAY_ADDRESS": "local"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("Started training worker group of size") == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: 26 samples over 2 ranks make no batch of 400")


def _machine(cpus, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


def _held(nodes, frequency="off", **options):
    """What a worker holds of a cluster, as (CPUs, GPUs)."""
    signals = {"frequency": FrequencyConfig(frequency), "attention": AttentionConfig("off")}
    args = RayPretrain(shards=["x"], cache="x", out=Path("x"), **signals, **options)
    held = worker_resources(args, nodes)
    return held["CPU"], held.get("GPU", 0)


def test_a_gpu_gets_its_share_of_the_cores_of_its_machine():
    assert _held([_machine(96.0, 8.0)], gpu=True) == (12, 1)
    assert _held([_machine(96.0, 8.0), _machine(32.0, 4.0)], gpu=True) == (8, 1)
    without, lost = _machine(4.0), _machine(2.0, 1.0, alive=False)
    assert _held([without, lost, _machine(9.0, 1.0)], gpu=True) == (9, 1)
    assert _held([_machine(192.0, 4.0)], gpu=True) == (16, 1)
    assert _held([_machine(2.0, 4.0)], gpu=True) == (1, 1)
    assert _held([_machine(96.0, 8.0)], gpu=True, cpus_per_worker=3) == (3, 1)
    assert _held([_machine(96.0, 8.0)]) == (1, 0)


def test_a_refresh_beside_it_finds_a_core_and_a_quarter_of_each_gpu_free():
    node, kind = [_machine(96.0, 8.0)], "refreshed"
    assert _held(node, kind, gpu=True) == (11, 0.75)
    assert _held(node, kind, gpu=True, refresher=RefreshWorkers(None, 2, 0.4)) == (10, 0.6)
    # Other GPUs than the training's, or none.
    assert _held(node, kind, gpu=True, refresher=RefreshWorkers(gpus_per_worker=1.0)) == (11, 1)
    assert _held(node, kind, gpu=True, refresher=RefreshWorkers(gpus_per_worker=0.0)) == (11, 1)
    pinned = RefreshConfig(pin="run-a/1")
    assert _held(node, kind, gpu=True, refresh=pinned) == (12, 1)


def test_cores_are_asked_for_where_no_machine_has_a_gpu_yet():
    with pytest.raises(ValueError, match="give --cpus-per-worker"):
        _held([_machine(64.0)], gpu=True)
    assert _held([_machine(64.0)], gpu=True, cpus_per_worker=8) == (8, 1)
