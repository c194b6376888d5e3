import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch
from launch import program_file
from runs import equal, log_events, weights

from famt.jobs import refresh_scores
from famt.jobs.cache import Gc, Ls
from famt.jobs.cache import main as cache_main
from famt.jobs.options import RefreshScores
from famt.jobs.refresh_scores import follow
from famt.jobs.refresh_scores import main as refresh
from famt.pipeline.scores import is_generation
from famt.pipeline.table import load_samples
from famt.train import checkpoint
from famt.train.checkpoint import CLASSIFIER, Checkpoint
from famt.train.signals.due import encoder_path, failed_path, finished_path, is_followed

RAY = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}


def _train(scored, out, *more):
    return [
        sys.executable, "-m", "famt.train.pretrain", "--shards", *scored.shards,
        "--cache", scored.cache.url, "--out", str(out), "--model", "vit_nano",
        "--frequency.source", "refreshed", "--frequency.kind", "frequency_attention",
        "--attention.source", "off", "--plain-epochs", "1", "--refresh.every", "2",
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
    for each in [process, *_started_by(process)]:
        each.kill()
    process.wait()


def _started_by(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


KILLS = int(os.environ.get("FAMT_KILLS", "2"))


@pytest.mark.slow
def test_equal_runs_in_one_cache_whose_jobs_are_killed_end_as_one_without(scored, tmp_path):
    """Both give the same encoders, so each job meets, and collects beside, the other's maps."""
    outs = [tmp_path / "first", tmp_path / "second"]
    commands = {out: _train(scored, out, "--refresh.wait", "--epochs", "8") for out in outs}
    quiet = {"env": RAY, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    runs = {out: subprocess.Popen(command, **quiet) for out, command in commands.items()}
    jobs = {out: _follow(out) for out in outs}
    chance = random.Random(0)
    for _ in range(KILLS):
        time.sleep(chance.uniform(5, 20))
        out = chance.choice(outs)
        _kill_group(jobs[out])
        jobs[out] = _follow(out)
        out = chance.choice(outs)
        runs[out].kill()
        runs[out].wait()
        runs[out] = subprocess.Popen(commands[out], **quiet)
    for out in outs:
        assert runs[out].wait(timeout=400) == 0
        jobs[out].communicate(timeout=120)
    undisturbed = tmp_path / "undisturbed"
    job = _follow(undisturbed)
    alone = _train(scored, undisturbed, "--refresh.wait", "--epochs", "8")
    subprocess.run(alone, check=True, timeout=400, **quiet)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    taken = [None, 3, 3, 9, 9, 15, 15, 21]
    epochs = {str(epoch): [3 * epoch, step] for epoch, step in enumerate(taken)}
    for out in (undisturbed, *outs):
        state = checkpoint.load(out)
        assert (state.step, state.signals) == (24, {"frequency": {"generation": 21}})
        assert equal(state.model, weights(undisturbed))
        assert json.loads((out / "generations.json").read_text())["epochs"] == epochs
        for generation in scored.cache.generations.of(state.run):
            ids = load_samples(scored.shards, scored.cache).shard_ids
            scored.cache.read_maps(ids, generation.specs[0])


@pytest.mark.slow
def test_a_follower_serves_a_run_that_does_not_wait_until_it_is_finished(scored, tmp_path, capsys):
    out = tmp_path / "run"
    follower = _follow(out)
    options = _train(
        scored, out, "--epochs", "150", "--refresh.every", "20", "--checkpoint-minutes", "9"
    )[3:]
    subprocess.run(
        [sys.executable, program_file("pretrain_at_leisure"), *options],
        env=RAY, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    output, errors = follower.communicate(timeout=120)
    assert follower.returncode == 0, errors
    summaries = [json.loads(line) for line in output.splitlines()]
    assert all(each["images"] == 26 and not each["failed"] for each in summaries)
    assert finished_path(out).exists()
    events = log_events(out, "generation")
    assert events
    assert all(each["coverage"] == 1 and each["age_steps"] >= 0 for each in events)
    used = checkpoint.load(out).signals["frequency"]["generation"]
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
        _train(scored, tmp_path / "run", "--epochs", "2", "--precision", "bf16"),
        env=RAY, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "tests/programs/refresh_on_a_full_cluster.py", str(tmp_path / "run")],
        env=RAY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one actor on CPUs at low priority" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == {}
    (made,) = scored.cache.generations.of(checkpoint.load(tmp_path / "run").run)
    assert [spec.precision for spec in made.specs] == ["bf16"]  # the run's


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
        for process in _started_by(job):
            if "ray::_Refresher" in _title(process):
                process.kill()
                killed = True
        time.sleep(0.01)
    output, errors = job.communicate(timeout=120)
    assert killed
    assert job.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["failed"] == {}
    run = checkpoint.load(tmp_path / "run").run
    assert [each.step for each in scored.cache.generations.of(run)] == [6]


@contextmanager
def _follow_here(monkeypatch, out, outcomes):
    """Follow in this process, where a generation is made, or fails, at once.

    Gives what was tried so far: an encoder, and the reason that the run is then told.
    """
    tried = []

    def make(path, args, over):
        failed = failed_path(path)
        tried.append((path.read_bytes(), failed.read_text() if failed.exists() else None))
        return outcomes.pop(0) if outcomes else None

    monkeypatch.setattr(refresh_scores, "_try", make)
    monkeypatch.setattr(refresh_scores, "_POLL", 0.01)
    monkeypatch.setattr(refresh_scores, "_RETRY", 0.05)
    left, codes = threading.Event(), []
    args = RefreshScores(follow=out)
    thread = threading.Thread(target=lambda: codes.append(follow(out, args, left)), daemon=True)
    thread.start()
    try:
        yield tried
        finished_path(out).touch()
        thread.join(60)
        assert codes == [0]
    finally:
        left.set()
        thread.join(60)


def test_a_follower_scores_each_encoder_once_though_a_new_run_repeats_its_name(
    tmp_path, monkeypatch
):
    path = encoder_path(tmp_path, 14)
    path.parent.mkdir()
    path.write_bytes(b"first")
    assert not is_followed(tmp_path)
    with _follow_here(monkeypatch, tmp_path, []) as tried:
        _until(lambda: tried == [(b"first", None)])
        assert is_followed(tmp_path)
        path.unlink()
        path.with_suffix(".new").write_bytes(b"second")
        path.with_suffix(".new").rename(path)
        _until(lambda: tried == [(b"first", None), (b"second", None)])
    assert not is_followed(tmp_path)


def test_a_follower_says_why_it_failed_and_tries_again(tmp_path, monkeypatch):
    path = encoder_path(tmp_path, 14)
    path.parent.mkdir()
    path.write_bytes(b"first")
    with _follow_here(monkeypatch, tmp_path, ["a tar is gone"]) as tried:
        _until(lambda: len(tried) == 2 and not failed_path(path).exists())
        assert tried == [(b"first", None), (b"first", "a tar is gone\n")]


def test_a_file_that_holds_no_encoder_is_refused_by_name(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is neither a checkpoint nor an encoder"):
        refresh(RefreshScores(checkpoint=tmp_path / "other.pt"))
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint"):
        refresh(RefreshScores(checkpoint=tmp_path / "none.pt"))


def test_a_run_of_fine_tuning_is_refused_by_name(tmp_path):
    state = Checkpoint(
        run="run-a", step=1, schedule_start=0, epoch=0, method=CLASSIFIER, sizes={}, model={},
        ema=None, optimizer={}, signals={}, ranks=[], config={},
    )  # fmt: skip
    checkpoint.save(tmp_path, state, keep=1)
    with pytest.raises(ValueError, match="is of fine-tuning; give the run that was pre-trained"):
        refresh(RefreshScores(checkpoint=tmp_path))


def test_neither_or_both_ways_to_name_an_encoder_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "jobs/refresh_scores.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "one of --checkpoint, --follow and --init" in done.stderr
