import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from launch import finish, kill_at_random, launch, program_file
from runs import equal, log_events, log_points, weights

from famt.pipeline.errors import UserError
from famt.train import checkpoint
from famt.train.pretrain import Run
from famt.train.run_log import pictures
from famt.train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig
from famt.train.signals.refresh_folder import RefreshFolder

EVERY_STEP = {"checkpoint_minutes": 0.0, "keep_checkpoints": 99}


def _go_back(out, count):
    """Remove a run's checkpoints but the first ones."""
    for path in checkpoint.files(out)[count:]:
        path.unlink()


@pytest.mark.parametrize(("batch_size", "steps_an_epoch"), [(4, 4), (17, 1)])
def test_an_elastic_run_goes_on_from_the_beginning_of_its_epoch(
    config, begin, train, batch_size, steps_an_epoch
):
    out = train(**EVERY_STEP)
    _go_back(out, 5)  # to the middle of the second epoch
    fewer = {"shards": config.shards[:2], "batch_size": batch_size}
    with pytest.raises(
        UserError, match=rf"8 -> {batch_size}; other training images\).* or --elastic"
    ):
        train(**fewer)
    before = weights(out)
    run = begin(**fewer, elastic=True)
    assert (run.step, run.loader.epoch) == (5, 1)
    assert run.last_step == 5 + 2 * steps_an_epoch  # 17 images
    assert equal(run.model.state_dict(), before)
    train(**fewer, elastic=True)
    last = checkpoint.load(out)
    assert (last.step, last.epoch) == (run.last_step, 3)
    assert not equal(last.model, before)
    train(**fewer)  # which is now exactly the run that the folder holds
    assert checkpoint.load(out).step == run.last_step
    assert [line["step"] for line in log_points(out)] == list(range(1, run.last_step + 1))


def test_garbage_in_the_log_stops_no_run(config, train):
    (config.out / "log.jsonl").write_bytes(
        b'\xff{"step": null}\n{"step": null}\n[1]\n{"step": 1, "cut o'
    )
    assert [line["step"] for line in log_points(train(epochs=1))] == [1, 2, 3]


@pytest.mark.parametrize(
    ("attention", "crops_per_image"), [("rolling", 1), ("rolling", 2), ("live", 1), ("off", 1)]
)
# Of 9 steps: the first, one in an epoch, the last of one.
@pytest.mark.parametrize(
    ("step", "asked"), [(0, signal.SIGTERM), (4, signal.SIGINT), (5, signal.SIGUSR1)]
)
def test_a_signal_stops_a_run_after_the_step_in_hand_and_costs_no_bit(
    train, tmp_path, monkeypatch, capsys, attention, crops_per_image, step, asked
):
    options = {
        "attention": AttentionConfig(attention, every=2, image_size=16),
        "crops_per_image": crops_per_image,
        "log_steps": 20,
    }
    whole = train(**options)
    options["out"] = tmp_path / "stopped"
    original = Run.forward_backward

    def interrupted(run, batch):
        if run.step == step:
            os.kill(os.getpid(), asked)
        return original(run, batch)

    monkeypatch.setattr(Run, "forward_backward", interrupted)
    stopped = train(**options)
    monkeypatch.undo()
    told = capsys.readouterr().out
    assert ("stopping after this step" in told) == (asked == signal.SIGINT)
    where = f"after step {step + 1} of {9 * crops_per_image}, with a checkpoint"
    assert told.endswith(f" stopped {where}; the same command resumes\n")
    assert log_events(stopped, "stopped by a signal")
    assert checkpoint.load(stopped).step == step + 1
    train(**options)
    assert equal(weights(stopped), weights(whole))
    assert pictures(stopped, 6) == pictures(whole, 6)


def test_a_finished_run_is_left_alone_and_says_so_in_place_of_its_plan(train, capsys):
    refreshed = {"frequency": FrequencyConfig("refreshed"), "refresh": RefreshConfig(every=1)}
    before = checkpoint.latest(train(**refreshed)).stat()
    assert "maps used" in capsys.readouterr().err
    # A job would leave at once, and the run that waits for one would end with an error.
    out = train(**refreshed | {"refresh": RefreshConfig(every=1, wait=True)})
    after = checkpoint.latest(out).stat()
    told = capsys.readouterr()
    assert told.out.startswith(f"{out} is finished: all 9 steps were done before.")
    assert told.out.count("\n") == 1
    assert "pretrain:" not in told.err
    assert "maps used" not in told.err
    assert RefreshFolder(out).finished.exists()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_own_samples(
    config, train, monkeypatch
):
    original, batches = Run.forward_backward, []

    def poisoned(run, batch):
        batches.append([run.samples.key(row) for row in batch.views.rows.tolist()])
        if run.step == 1:
            batch = dataclasses.replace(batch, visible=batch.visible.float() * float("inf"))
        return original(run, batch)

    monkeypatch.setattr(Run, "forward_backward", poisoned)
    with pytest.raises(FloatingPointError, match="at step 2; the samples are in"):
        train(log_steps=4)
    (record,) = config.out.glob("nan-rank0-step00000002.txt")
    assert record.read_text().splitlines() == batches[1]
    assert all(".tar:img" in name for name in batches[1])
    assert checkpoint.latest(config.out) is None


def test_a_run_that_ran_away_goes_on_as_its_message_says(config, begin, train):
    remedies = "a lower --optimiser.base-learning-rate and --elastic.* remove that checkpoint"
    with pytest.raises(FloatingPointError, match=remedies):
        train(
            **EVERY_STEP, optimiser=dataclasses.replace(config.optimiser, base_learning_rate=1e30)
        )
    *_, before, last = checkpoint.files(config.out)
    last.unlink()  # it holds the weights that ran away
    optimiser = dataclasses.replace(config.optimiser, base_learning_rate=0.04, weight_decay=0.3)
    run = begin(optimiser=optimiser, elastic=True)
    groups = run.optimisation.optimizer.param_groups
    assert run.step == checkpoint.load(before).step
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    run.optimisation.schedule.step_update(run.optimisation.warmup_steps)
    assert groups[0]["lr"] == pytest.approx(0.04 * 8 / 256)
    train(optimiser=optimiser, elastic=True)
    assert checkpoint.load(config.out).epoch == config.epochs


@pytest.mark.slow
def test_ranks_log_their_mean_loss_and_stop_together_at_one_that_is_no_number(config, tmp_path):
    options = {"shards": config.shards, "cache": config.cache}
    torch.save(options, tmp_path / "options.pt")
    finish(launch(program_file("lose_a_loss"), str(tmp_path), machines=["a", "a"]))
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "at step 2; the samples are in" in first
    assert "nan-rank1-step00000002.txt" in first
    (line,) = log_points(tmp_path / "run")
    means = [float((tmp_path / f"loss{rank}.txt").read_text()) for rank in range(2)]
    assert means[0] != means[1]
    assert line["loss"] == pytest.approx(sum(means) / 2, rel=1e-6)


def _command(config, *more):
    return [
        "-m", "famt.train.pretrain", "--shards", *config.shards, "--cache", config.cache,
        "--recipe", "famt", "--model", "vit_nano", "--epochs", "6", "--batch-size", "4",
        "--spec.grid", "7", "--device", "cpu", "--threads", "1", "--log-steps", "1",
        "--checkpoint-minutes", "0", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("attention", ["rolling", "seen"])
def test_kill_9_at_random_moments_only_pauses_a_run(config, tmp_path, world_size, attention):
    sources = ["--attention.source", attention, "--hardness.source", "errors"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if world_size > 1 else []
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }

    def command(out):
        return [
            sys.executable,
            *launcher,
            *_command(config, "--out", str(out), "--epochs", "40", *sources),
        ]

    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, timeout=300, **quiet)
    kill_at_random(command(out), out, quiet["env"])
    subprocess.run(command(out), check=True, timeout=300, **quiet)
    assert equal(weights(whole), weights(out))
    state = checkpoint.load(out)
    assert state.step == 40 * 6 // world_size  # 26 samples in batches of 4 a rank
    assert len(state.ranks) == world_size
    json.dumps(state.config)


@pytest.mark.slow
def test_ranks_leave_a_look_of_the_monitor_together(config):
    options = ["--monitor", *config.shards, "--monitor-epochs", "1", "--log-steps", "2"]
    command = _command(config, *options)
    whole, stopped = config.out / "whole", config.out / "stopped"

    def run(number, out):
        program = [program_file("stop_while_testing"), str(number), *command[1:]]
        finish(launch(*program, "--out", str(out), machines=["a", "a"]))

    run(99, whole)
    run(3, stopped)
    assert log_events(stopped, "stopped by a signal")
    assert checkpoint.load(stopped).step == log_points(stopped)[-1]["step"] == 9
    run(99, stopped)
    looks = [line["step"] for line in log_events(stopped, "evaluation")]
    assert looks == [3, 6, 9, 12, 15, 18]
    assert equal(weights(stopped), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [["a", "a"], ["a", "b"]])
def test_ranks_stop_after_the_same_step_and_go_on_to_the_bit(config, tmp_path, machines):
    command = _command(config, "--log-steps", "1000", "--epochs", "40", "--attention.every", "2")
    stopped, whole = ([*command, "--out", str(tmp_path / name)] for name in ("stopped", "whole"))
    stop = [program_file("stop_at_a_step"), "1", "7", *stopped[1:]]
    finish(launch(*stop, machines=machines))
    assert checkpoint.load(tmp_path / "stopped").step == 8  # in the middle of the third epoch
    for each in (stopped, whole):
        finish(launch(*each[1:], machines=machines))
    one, other = (checkpoint.load(tmp_path / name) for name in ("stopped", "whole"))
    assert one.step == other.step == 120
    assert equal(one.model, other.model)
    maps, others = (each.components["attention"]["maps"] for each in (one, other))
    assert torch.equal(maps, others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "sent", "rank"),
    [
        (["a", "a"], signal.SIGKILL, 0),
        (["a", "a", "b", "b"], signal.SIGKILL, 2),
        (["a", "a", "b", "b"], signal.SIGTERM, 3),
    ],
)
def test_ranks_on_a_slow_disk_end_within_30_s_and_say_why(config, machines, sent, rank):
    arguments = _command(config, "--out", str(config.out), "--epochs", "999")[2:]
    program = program_file("pretrain_on_a_slow_disk")
    processes = launch(program, *arguments, machines=machines)
    while len(log_points(config.out)) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[rank].send_signal(sent)
    started = time.monotonic()
    try:
        said = [process.communicate(timeout=30)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - started < 30
    codes = [process.returncode for process in processes]
    if sent == signal.SIGTERM:
        assert codes == [0] * len(machines)
        assert "stopped by a signal" in (config.out / "log.jsonl").read_text()
        assert checkpoint.load(config.out).step == len(log_points(config.out))
    else:
        assert codes == [-9 if each == rank else 2 for each in range(len(machines))]
        name = f"rank {rank} (process {processes[rank].pid} on "
        for text in said[:rank] + said[rank + 1 :]:
            assert name in text.splitlines()[-1]
