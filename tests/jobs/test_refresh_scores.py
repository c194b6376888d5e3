import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from jobs import refresh_scores
from jobs.cache import Gc, Ls
from jobs.cache import main as cache_main
from jobs.refresh_scores import RefreshScores, follow
from jobs.refresh_scores import main as refresh
from pipeline.scores import is_generation
from train import checkpoint
from train.signals.following import encoder_path, failed_path, finished_path

RAY = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}


def _train(scored, out, *more):
    return [
        sys.executable, "-m", "train.pretrain", "--shards", *scored.shards,
        "--cache", scored.cache.url, "--out", str(out), "--model", "vit_nano",
        "--recipe", "famt-paper", "--plain-epochs", "1", "--refresh.every", "2",
        "--epochs", "6", "--batch-size", "8", "--spec.grid", "7", "--log-steps", "1",
        "--checkpoint-minutes", "0", "--device", "cpu", "--threads", "1", *more,
    ]  # fmt: skip


def _follow(out, *more):
    """A follower and its local Ray, in a process group of their own."""
    return subprocess.Popen(
        [sys.executable, "jobs/refresh_scores.py", "--follow", str(out), "--workers", "1", *more],
        env=RAY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def _kill_group(process):
    """End, as a lost machine would, a process and all that it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    for each in [process, *children]:
        each.kill()
    process.wait()


def _events(out, name):
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [each for each in map(json.loads, lines) if each.get("event") == name]


def _equal(first, second):
    return all(torch.equal(first.model[name], second.model[name]) for name in first.model)


def _until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.slow
def test_a_run_with_killed_jobs_and_kills_of_its_own_ends_as_one_without(scored, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    follower = _follow(whole)
    subprocess.run(
        _train(scored, whole, "--refresh.wait"),
        env=RAY,
        check=True,
        capture_output=True,
        timeout=300,
    )
    _, errors = follower.communicate(timeout=120)
    assert follower.returncode == 0, errors
    taken = [(each["epoch"], each["generation"]) for each in _events(whole, "generation")]
    assert taken == [(1, 3), (3, 9), (5, 15)]

    command = _train(scored, killed, "--refresh.wait", "--seed", "1")
    process = subprocess.Popen(command, env=RAY, stderr=subprocess.DEVNULL)
    follower = _follow(killed)
    _until(lambda: encoder_path(killed, 3).exists())
    time.sleep(1)
    _kill_group(follower)  # the job dies while training waits for it
    follower = _follow(killed)
    _until(lambda: _events(killed, "generation"))
    time.sleep(0.3)
    process.kill()
    process.wait()
    subprocess.run(command, env=RAY, check=True, capture_output=True, timeout=300)
    follower.communicate(timeout=120)
    undisturbed = tmp_path / "undisturbed"
    follower = _follow(undisturbed)
    again = _train(scored, undisturbed, "--refresh.wait", "--seed", "1")
    subprocess.run(again, env=RAY, check=True, capture_output=True, timeout=300)
    follower.communicate(timeout=120)
    first, second = checkpoint.load(undisturbed), checkpoint.load(killed)
    assert first.step == second.step == 18
    assert first.signals == second.signals == {"content": {"generation": 15}}
    assert _equal(first, second)
    assert [
        json.loads((out / "generations.json").read_text())["epochs"]
        for out in (undisturbed, killed)
    ] == [{str(epoch): [3 * epoch, [None, 3, 3, 9, 9, 15][epoch]] for epoch in range(6)}] * 2


@pytest.mark.slow
def test_a_follower_serves_a_run_that_does_not_wait_until_it_is_finished(scored, tmp_path, capsys):
    out = tmp_path / "run"
    follower = _follow(out)
    subprocess.run(
        _train(scored, out, "--epochs", "900", "--refresh.every", "50",
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
    used = checkpoint.load(out).signals["content"]["generation"]
    assert used == events[-1]["generation"]

    cache_main(Ls(scored.cache.url))
    assert f"/{used}: generation-frequency_attention-" in capsys.readouterr().out
    run = checkpoint.load(out).run
    before = {each.step for each in scored.cache.generations.of(run)}
    cache_main(Gc(scored.cache.url, older_than_hours=0))
    after = {each.step for each in scored.cache.generations.of(run)}
    assert used in after
    assert max(before) in after
    named = {spec.id for each in scored.cache.generations.of(run) for spec in each.specs}
    assert _generation_maps(scored.cache) == named
    cache_main(Gc(scored.cache.url, older_than_hours=0, drop_runs=[run]))
    assert scored.cache.generations.runs() == []
    assert _generation_maps(scored.cache) == set()


def _generation_maps(cache):
    return {each for entry in cache.entries() for each in entry.specs if is_generation(each)}


@pytest.mark.slow
def test_a_refresh_beside_a_training_that_holds_the_whole_cluster_comes_to_its_end(
    scored, tmp_path
):
    subprocess.run(
        _train(scored, tmp_path / "run", "--epochs", "2"),
        env=RAY, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "tests/programs/refresh_on_a_full_cluster.py", str(tmp_path / "run")],
        env=RAY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one actor on CPUs at low priority" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == {}


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


def _follow_here(monkeypatch, out, outcomes):
    """Follow in this process, where a generation is made, or fails, at once."""
    tried = []

    def make(path, args, over):
        tried.append(path.read_bytes())
        return outcomes.pop(0) if outcomes else None

    monkeypatch.setattr(refresh_scores, "_try", make)
    monkeypatch.setattr(refresh_scores, "_POLL", 0.01)
    monkeypatch.setattr(refresh_scores, "_RETRY", 0.05)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(follow(out, RefreshScores(follow=out))))
    thread.start()
    return tried, thread, codes


def test_a_follower_scores_each_encoder_once_though_a_new_run_repeats_its_name(
    tmp_path, monkeypatch
):
    path = encoder_path(tmp_path, 14)
    path.parent.mkdir()
    path.write_bytes(b"first")
    tried, thread, codes = _follow_here(monkeypatch, tmp_path, [])
    _until(lambda: tried == [b"first"])
    path.unlink()
    path.with_suffix(".new").write_bytes(b"second")
    path.with_suffix(".new").rename(path)
    _until(lambda: tried == [b"first", b"second"])
    finished_path(tmp_path).touch()
    thread.join()
    assert codes == [0]


def test_a_follower_says_why_it_failed_and_tries_again(tmp_path, monkeypatch):
    path = encoder_path(tmp_path, 14)
    path.parent.mkdir()
    path.write_bytes(b"first")
    tried, thread, codes = _follow_here(monkeypatch, tmp_path, ["a tar is gone"])
    _until(lambda: failed_path(path).exists())
    assert failed_path(path).read_text() == "a tar is gone\n"
    _until(lambda: len(tried) == 2 and not failed_path(path).exists())
    finished_path(tmp_path).touch()
    thread.join()
    assert codes == [0]


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
