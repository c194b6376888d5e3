import json
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from launch import RAY, program_file, run, until
from runs import equal, log_events, weights

from famt.jobs import refresh_scores
from famt.jobs.options import RefreshScores
from famt.jobs.refresh_scores import follow
from famt.jobs.refresh_scores import main as refresh
from famt.mae import MaskedAutoencoder
from famt.models import MODELS, ModelConfig
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.scoring.generation import generation_path, generations, open_generation
from famt.train import checkpoint
from famt.train.checkpoint import CLASSIFIER, Checkpoint
from famt.train.signals.refresh_folder import Encoder, RefreshFolder


def _train(scored, out, *more):
    return [
        "-m", "famt.train.pretrain", "--shards", *scored.shards,
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


KILLS = int(os.environ.get("FAMT_KILLS", "2"))


@pytest.mark.slow
def test_a_run_that_is_killed_as_its_jobs_are_ends_as_one_that_is_not(scored, tmp_path):
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    quiet = {"env": RAY, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = "--refresh.wait", "--epochs", "8"
    job, command = _follow(out), [sys.executable, *_train(scored, out, *options)]
    training = subprocess.Popen(command, **quiet)
    chance = random.Random(0)
    for _ in range(KILLS):
        time.sleep(chance.uniform(5, 20))
        _kill_group(job)
        job = _follow(out)
        time.sleep(chance.uniform(0, 5))
        training.kill()
        training.wait()
        training = subprocess.Popen(command, **quiet)
    assert training.wait(timeout=600) == 0
    job.communicate(timeout=120)
    job = _follow(undisturbed)
    run(*_train(scored, undisturbed, *options))
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    epochs = [None, 3, 3, 9, 9, 15, 15, 21]
    samples, maps = load_samples(scored.shards, scored.cache), []
    for each in (undisturbed, out):
        state = checkpoint.load(each)
        assert (state.step, state.components["frequency"]) == (24, {"generation": 21})
        record = json.loads((each / "refresh" / "epochs.json").read_text())["epochs"]
        assert record == {str(epoch): [3 * epoch, step] for epoch, step in enumerate(epochs)}
        (last,) = generations(each / "refresh")
        maps.append(open_generation(last).maps(samples, ["frequency_attention"], 8))
        left = {path.name for path in (each / "refresh").iterdir()}
        assert left == {last.name, "epochs.json", "finished", "follower.lock"}
    assert equal(*maps)
    assert equal(weights(out), weights(undisturbed))


@pytest.mark.slow
def test_a_follower_serves_a_run_that_does_not_wait_until_it_is_finished(scored, tmp_path):
    out = tmp_path / "run"
    follower = _follow(out, "--json")
    options = _train(
        scored, out, "--epochs", "150", "--refresh.every", "20", "--checkpoint-minutes", "9"
    )[2:]
    run(program_file("pretrain_at_leisure"), *options)
    output, errors = follower.communicate(timeout=120)
    assert follower.returncode == 0, errors
    summaries = [json.loads(line) for line in output.splitlines()]
    assert all(each["images"] == 26 and not each["failed"] for each in summaries)
    assert RefreshFolder(out).finished.exists()
    events = log_events(out, "generation")
    assert events
    assert all(each["age_steps"] >= 0 for each in events)
    used = checkpoint.load(out).components["frequency"]["generation"]
    assert used == events[-1]["generation"]


@pytest.mark.slow
def test_a_refresh_beside_a_training_that_holds_the_whole_cluster_comes_to_its_end(
    scored, tmp_path
):
    out = tmp_path / "run"
    run(*_train(scored, out, "--epochs", "2", "--precision", "bf16"))
    done = run(program_file("refresh_on_a_full_cluster"), str(out), str(tmp_path / "maps"))
    assert "one low-priority actor on CPUs" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == {}
    (made,) = generations(tmp_path / "maps")
    assert open_generation(made).specs["frequency_attention"]["precision"] == "bf16"  # the run's


@pytest.mark.slow
def test_a_lost_worker_is_replaced(scored, tmp_path):
    run(*_train(scored, tmp_path / "run", "--epochs", "2"))
    job = subprocess.Popen(
        [sys.executable, "jobs/refresh_scores.py", "--checkpoint", str(tmp_path / "run"),
         "--out", str(tmp_path), "--workers", "1", "--batch-size", "1", "--json"],
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
    assert generations(tmp_path) == [generation_path(tmp_path, 6)]


@contextmanager
def _follow_here(monkeypatch, folder, outcomes):
    """Follow in this process, where a generation is made, or fails, at once.

    Gives what was tried so far: an encoder, and the reason that the run is then told.
    """
    tried = []

    def make(folder, step, args, over):
        failure = folder.failure(step)
        tried.append((folder.encoder(step).read_text(), failure.exists() and failure.read_text()))
        outcome = outcomes.pop(0) if outcomes else None
        if not outcome:
            folder.generation(step).touch()
        return outcome

    monkeypatch.setattr(refresh_scores, "_try", make)
    monkeypatch.setattr(refresh_scores, "_POLL", 0.01)
    monkeypatch.setattr(refresh_scores, "_RETRY", 0.05)
    left, codes = threading.Event(), []
    out = folder.path.parent
    args = RefreshScores(follow=out)
    thread = threading.Thread(target=lambda: codes.append(follow(out, args, left)), daemon=True)
    thread.start()
    try:
        yield tried
        folder.finish()
        thread.join(60)
        assert codes == [0]
    finally:
        left.set()
        thread.join(60)


def test_a_follower_makes_what_is_due_and_again_what_was_removed(tmp_path, monkeypatch):
    folder = RefreshFolder(tmp_path)
    assert not folder.is_followed()
    with _follow_here(monkeypatch, folder, []) as tried:
        until(folder.is_followed)
        folder.encoder(14).write_text("first")
        until(folder.generation(14).exists)
        folder.generation(14).unlink()
        until(folder.generation(14).exists)
        folder.encoder(28).write_text("second")
        until(folder.generation(28).exists)
    assert tried == [("first", False), ("first", False), ("second", False)]
    assert not folder.is_followed()


def test_a_follower_says_why_it_failed_and_tries_again(tmp_path, monkeypatch):
    folder = RefreshFolder(tmp_path)
    folder.path.mkdir()
    folder.encoder(14).write_text("first")
    with _follow_here(monkeypatch, folder, ["a tar is gone"]) as tried:
        until(lambda: len(tried) == 2 and not folder.failure(14).exists())
        assert tried == [("first", False), ("first", "a tar is gone\n")]


def _encoder(scored, run):
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    return Encoder(
        run=run, step=7, sizes=vars(ModelConfig.of(encoder)), weights=encoder.state_dict(),
        config={"precision": "fp32", "cache": scored.cache.url}, kinds=["attention"],
        urls=scored.shards,
    )  # fmt: skip


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_written_of_an_encoder_that_is_gone_meanwhile(
    scored, tmp_path, monkeypatch, replaced
):
    folder = RefreshFolder(tmp_path)
    folder.save(_encoder(scored, "run-dead"))

    def score_all(samples, encoder, cache, maps, args, over):
        assert not over()
        for each in maps.values():
            each[:] = 1
        folder.encoder(7).unlink()
        if replaced:
            folder.save(_encoder(scored, "run-new"))
        return {}

    monkeypatch.setattr(refresh_scores, "_score_all", score_all)
    assert refresh_scores._try(folder, 7, RefreshScores(), lambda: False) is None
    assert generations(folder.path) == []
    assert folder.due() == (7 if replaced else None)


def test_a_generation_is_never_overwritten(scored, tmp_path):
    checkpoint.write(tmp_path / "encoder.pt", _encoder(scored, "run-a"))
    generation_path(tmp_path, 7).touch()
    with pytest.raises(UserError, match=r"generation-00000007\.zip exists already; give another"):
        refresh(RefreshScores(checkpoint=tmp_path / "encoder.pt", out=tmp_path))


def test_a_file_that_holds_no_encoder_is_refused_by_name(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt was not written by this program"):
        refresh(RefreshScores(checkpoint=tmp_path / "other.pt", out=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint"):
        refresh(RefreshScores(checkpoint=tmp_path / "none.pt", out=tmp_path))


def test_a_run_of_fine_tuning_is_refused_by_name(tmp_path):
    state = Checkpoint(
        run="run-a", step=1, epoch=0, method=CLASSIFIER, sizes={}, components={}, ranks=[],
        config={},
    )  # fmt: skip
    checkpoint.save(tmp_path, state, keep=1)
    with pytest.raises(UserError, match="is a fine-tuning run; give a pre-training run"):
        refresh(RefreshScores(checkpoint=tmp_path, out=tmp_path))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "one of --checkpoint, --follow and --init"),
        ({"init": "x", "follow": Path("x")}, "one of --checkpoint, --follow and --init"),
        ({"init": "x"}, "--checkpoint and --init need --out"),
        ({"follow": Path("x"), "out": Path("x")}, "--follow writes into the run's folder"),
    ],
)
def test_what_does_not_go_together_is_refused(given, why):
    with pytest.raises(UserError, match=why):
        refresh(RefreshScores(**given))
