import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from train.refresh import encoder_path, finished_path

from jobs.cache import Gc, Ls
from jobs.cache import main as cache_main
from jobs.refresh_scores import RefreshScores, _marked
from jobs.refresh_scores import main as refresh
from pipeline.scores import is_generation
from train import checkpoint

RAY = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}


def _train(scored, out, *more):
    return [
        sys.executable, "-m", "train.pretrain", "--shards", *scored.shards,
        "--cache", scored.cache.url, "--out", str(out), "--model", "vit_nano",
        "--recipe", "famt-paper", "--plain-epochs", "1", "--periodic.every", "2",
        "--epochs", "6", "--batch-size", "8", "--spec.grid", "7", "--log-steps", "1",
        "--checkpoint-minutes", "0", "--device", "cpu", "--threads", "1",
        "--refresh-job.workers", "1", *more,
    ]  # fmt: skip


def _events(out, name):
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [each for each in map(json.loads, lines) if each.get("event") == name]


def _equal(first, second):
    return all(torch.equal(first.model[name], second.model[name]) for name in first.model)


def _kill_all(pattern):
    """End, as a lost machine would, every process with `pattern` in its command line."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        if process.pid != os.getpid() and pattern in " ".join(process.info["cmdline"] or []):
            process.kill()


@pytest.mark.slow
def test_a_run_with_killed_jobs_and_kills_of_its_own_ends_as_one_without(scored, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(
        _train(scored, whole, "--refresh", "wait"),
        env=RAY,
        check=True,
        capture_output=True,
        timeout=300,
    )
    taken = [(each["epoch"], each["generation"]) for each in _events(whole, "generation")]
    assert taken == [(1, 3), (3, 9), (5, 15)]

    command = _train(scored, killed, "--refresh", "wait")
    process = subprocess.Popen(command, env=RAY, stderr=subprocess.PIPE, text=True)
    while not _events(killed, "refresh due"):
        time.sleep(0.05)
    time.sleep(1)
    _kill_all("jobs.refresh_scores")  # the job dies while training waits for it
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the refresh job of step 3 failed" in errors
    process = subprocess.Popen(command, env=RAY, stderr=subprocess.DEVNULL)
    while process.poll() is None and not _events(killed, "generation"):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _kill_all("jobs.refresh_scores")
    subprocess.run(command, env=RAY, check=True, capture_output=True, timeout=300)
    first, second = checkpoint.load(whole), checkpoint.load(killed)
    assert first.step == second.step == 18
    assert (first.generation, second.generation) == (15, 15)
    assert _equal(first, second)
    assert json.loads((whole / "generations.json").read_text()) == json.loads(
        (killed / "generations.json").read_text()
    )


@pytest.mark.slow
def test_a_follower_serves_a_run_that_does_not_wait_until_it_is_finished(scored, tmp_path, capsys):
    out = tmp_path / "run"
    follower = subprocess.Popen(
        [sys.executable, "jobs/refresh_scores.py", "--follow", str(out), "--workers", "1"],
        env=RAY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    subprocess.run(
        _train(scored, out, "--epochs", "900", "--periodic.every", "50",
               "--checkpoint-minutes", "9"),
        env=RAY, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    output, errors = follower.communicate(timeout=120)
    assert follower.returncode == 0, errors
    summaries = [json.loads(line) for line in output.splitlines()]
    assert all(each["images"] == 26 and not each["failed"] for each in summaries)
    assert finished_path(out).exists()
    events = _events(out, "generation")
    assert events
    assert all(each["coverage"] == 1 and each["age_steps"] >= 0 for each in events)
    used = checkpoint.load(out).generation
    assert used == events[-1]["generation"]

    cache_main(Ls(scored.cache.url))
    assert f"/{used}: generation-famt-" in capsys.readouterr().out
    run = checkpoint.load(out).run
    before = {each.step for each in scored.cache.generations.of(run)}
    cache_main(Gc(scored.cache.url, older_than_hours=0))
    after = {each.step for each in scored.cache.generations.of(run)}
    assert after == {used, max(before)}
    named = {each.spec.id for each in scored.cache.generations.of(run)}
    assert _generation_maps(scored.cache) == named
    cache_main(Gc(scored.cache.url, older_than_hours=0, drop_runs=[run]))
    assert scored.cache.generations.runs() == []
    assert _generation_maps(scored.cache) == set()


def _generation_maps(cache):
    return {each for entry in cache.entries() for each in entry.specs if is_generation(each)}


@pytest.mark.slow
def test_a_lost_worker_is_replaced(scored, tmp_path):
    subprocess.run(
        _train(scored, tmp_path / "run", "--epochs", "2"),
        env=RAY, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    job = subprocess.Popen(
        [sys.executable, "jobs/refresh_scores.py", "--checkpoint", str(tmp_path / "run"),
         "--workers", "1", "--batch-size", "1"],
        env=RAY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    killed = False
    while job.poll() is None and not killed:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::_Refresher" in " ".join(process.info["cmdline"] or []):
                process.kill()
                killed = True
        time.sleep(0.01)
    output, errors = job.communicate(timeout=120)
    assert killed
    assert job.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["failed"] == {}
    run = checkpoint.load(tmp_path / "run").run
    assert [each.step for each in scored.cache.generations.of(run)] == [6]


def test_a_follower_scores_each_encoder_once_though_a_new_run_repeats_its_name(tmp_path):
    path = encoder_path(tmp_path, 14)
    path.parent.mkdir()
    path.write_bytes(b"first")
    marked = _marked(tmp_path)
    assert next(marked) == path
    path.unlink()
    path.write_bytes(b"second")
    os.utime(path, ns=(1, 2))
    assert next(marked) == path
    finished_path(tmp_path).touch()
    assert list(marked) == []


def test_a_file_that_holds_no_encoder_is_refused_by_name(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is neither a checkpoint nor an encoder"):
        refresh(RefreshScores(checkpoint=tmp_path / "other.pt"))
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint"):
        refresh(RefreshScores(checkpoint=tmp_path / "none.pt"))


def test_neither_or_both_ways_to_name_an_encoder_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "jobs/refresh_scores.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "one of --checkpoint, --follow and --init" in done.stderr
