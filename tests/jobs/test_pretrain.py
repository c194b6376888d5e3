import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import RAY, run
from runs import equal, log_events

from famt.jobs.options import RayPretrain, RefreshWorkers
from famt.jobs.pretrain import beside, main, worker_resources
from famt.jobs.refresh_scores import following
from famt.pipeline.errors import UserError
from famt.pipeline.scoring.generation import generation_path
from famt.train import checkpoint
from famt.train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig
from famt.train.signals.refresh_folder import RefreshFolder


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
        *more,
    ]  # fmt: skip


def _beside(job):
    """What a training started: its refresh job, and Ray's processes."""
    return psutil.Process(job.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["famt", "famt-paper"])
def test_one_command_brings_the_refresh_job_along_and_ends_it(scored, tmp_path, recipe):
    out = tmp_path / "run"
    # Enough epochs for the first of them to be taken up, which famt-paper waits for.
    waits = ["--refresh.wait"] if recipe == "famt" else []
    command = _command(
        scored, out, "--recipe", recipe, "--model", "vit_nano", "--decoder-width", "64",
        "--epochs", "4", "--refresh.every", "2", "--device", "cpu", *waits,
    )  # fmt: skip
    process = subprocess.Popen(
        command, env=RAY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started = []
    while process.poll() is None:
        started.extend(each for each in _beside(process) if each not in started)
        time.sleep(0.2)
    plan, errors = process.communicate()
    assert process.returncode == 0, errors
    # No word of a job that is lacking; famt-paper waits by itself.
    assert "every 2 epochs, 1 time, by a job beside this run, which waits for it\n" in plan
    (event,) = log_events(out, "generation")
    assert event["generation"] == 12
    assert not log_events(out, "refresh job ended")
    assert f"written to {generation_path(out / 'refresh', 12)}" in (out / "refresh.log").read_text()
    assert started
    psutil.wait_procs(started, timeout=30)
    assert not [each for each in started if each.is_running()]
    assert not RefreshFolder(out).is_followed()


def test_the_end_of_a_training_does_not_wait_for_the_refresh_job(tmp_path, monkeypatch):
    busy = tmp_path / "busy"
    busy.write_text("#!/bin/sh\ntrap '' TERM\ntouch up\nwhile [ -e up ]; do sleep 0.1; done\n")
    busy.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(busy))
    with following(tmp_path, RefreshWorkers()):
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        started = time.monotonic()
    took = time.monotonic() - started
    (tmp_path / "up").unlink()
    assert took < 5


def _arguments(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
def test_the_refresh_job_does_not_outlive_a_killed_training(scored, tmp_path):
    out = tmp_path / "run"
    command = _command(scored, out, "--epochs", "10000", "--device", "cpu")
    process = subprocess.Popen(command, env=RAY, stderr=subprocess.DEVNULL)
    jobs = []
    while len(jobs) < 5 or not (out.exists() and checkpoint.latest(out)):  # Ray is up as well
        assert process.poll() is None
        jobs = _beside(process)
        time.sleep(0.1)
    process.kill()
    process.wait()
    psutil.wait_procs(jobs, timeout=60)
    assert not [each for each in jobs if each.is_running()]
    assert not RefreshFolder(out).is_followed()


@pytest.mark.slow
def test_a_training_goes_on_and_says_so_where_the_refresh_job_dies(scored, tmp_path):
    out = tmp_path / "run"
    command = _command(scored, out, "--epochs", "10000", "--device", "cpu")
    process = subprocess.Popen(command, env=RAY, stderr=subprocess.PIPE, text=True)
    killed = False
    while not log_events(out, "refresh job ended"):
        assert process.poll() is None
        for each in [] if killed or not log_events(out, "start") else _beside(process):
            if "famt.jobs.refresh_scores" in " ".join(_arguments(each)):
                each.kill()
                killed = True
        time.sleep(0.1)
    assert killed
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "refresh job ended" in errors
    assert log_events(out, "stopped by a signal")


def test_gpus_of_ranks_are_for_ray_to_give(tmp_path):
    args = RayPretrain(shards=["x"], cache="x", out=tmp_path, gpu=True)
    with pytest.raises(UserError, match="--gpu needs --workers"):
        main(args)


def test_a_refresh_takes_every_other_core_or_one_place_on_each_gpu(monkeypatch):
    args = RayPretrain(shards=["x"], cache="x", out=Path("x"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert beside(args) == RefreshWorkers(workers=6)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert beside(args) == RefreshWorkers(workers=8, gpus_per_worker=1.0)
    assert beside(dataclasses.replace(args, device="cpu")) == RefreshWorkers(workers=6)
    told = RefreshWorkers(workers=3, batch_size=256)
    assert beside(dataclasses.replace(args, refresher=told)) == told
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # where the training may hold GPUs
    assert beside(args) == RefreshWorkers(workers=8)


@pytest.mark.slow
def test_ray_train_survives_a_killed_worker_with_the_same_weights(scored, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # A refresh beside them is taken up when it is there, at another step in each run.
    options = ["--workers", "2", "--frequency.source", "cached"]
    run(*_command(scored, whole, *options)[1:])
    process = subprocess.Popen(
        _command(scored, killed, *options), env=RAY, stderr=subprocess.PIPE, text=True
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
    command = _command(scored, tmp_path / "run", "--workers", "2", "--batch-size", "400")
    done = run(*command[1:], code=2)
    assert (done.stdout + done.stderr).count("Started training worker group of size") == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: 26 images over 2 ranks make no batch of 400")


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
    with pytest.raises(UserError, match="give --cpus-per-worker"):
        _held([_machine(64.0)], gpu=True)
    assert _held([_machine(64.0)], gpu=True, cpus_per_worker=8) == (8, 1)
