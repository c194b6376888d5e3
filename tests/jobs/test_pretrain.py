import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from train import checkpoint


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
        "--out", str(out), "--model", "vit_nano", "--epochs", "8", "--batch-size", "4",
        "--spec.grid", "7", "--log-steps", "1", "--checkpoint-minutes", "0", "--workers", "2",
        *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_ray_train_survives_a_killed_worker_with_the_same_weights(scored, tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        _command(scored, whole), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        _command(scored, killed), env=environment, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (killed.exists() and checkpoint.latest(killed)):
        time.sleep(0.02)
    os.kill(_workers(process)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if "event" in line].count("start") == 2
    first, second = checkpoint.load(whole), checkpoint.load(killed)
    assert first.step == second.step == 24
    assert first.config["world_size"] == 2
    assert all(torch.equal(first.model[name], second.model[name]) for name in first.model)


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
