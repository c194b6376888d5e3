import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch import finish, launch, program_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.models import MODELS
from jobs.refresh_scores import RefreshScores, follow
from pipeline.join import JoinConfig
from train import checkpoint
from train.config import Pretrain, parse
from train.distributed import join_ranks
from train.optimisation import OptimiserConfig
from train.pretrain import Run, main
from train.resume import own_folder
from train.signals.config import AttentionConfig, ContentConfig

KILLS = int(os.environ.get("FAMT_KILLS", "3"))


OFF = {"content": ContentConfig("off"), "attention": AttentionConfig("off")}


def _weights(folder):
    return checkpoint.load(folder).model


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_leaves_checkpoint_and_curves(config, capsys):
    config = dataclasses.replace(config, epochs=12)
    main(config)
    assert checkpoint.load(config.out).step == 36
    events = EventAccumulator(str(config.out)).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert len(losses) == 36
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    stages = {"data_wait", "signals", "join", "forward", "backward", "update"}
    assert {"learning_rate", "images_per_second", *(f"time/{each}" for each in stages)} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["crops"]
    plan = capsys.readouterr().out
    assert "64 = 28 masked (28 predicted) + 26 thrown + 10 visible" in plan
    assert "36 = 12 epochs x 3" in plan
    assert "2 skipped each epoch" in plan


def test_without_signals_options_of_weights_are_told_to_have_no_effect(config, capsys):
    join = JoinConfig(throw_ratio=0.3, visible="uniform", loss_exponent=1.0)
    main(dataclasses.replace(config, **OFF, join=join, epochs=1))
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    for option in ("--join.visible", "--join.loss-exponent", "--spec.grid"):
        assert option in told
    assert "throw-ratio" not in told
    # Nor has a job that follows the run anything to wait for.
    assert follow(config.out, RefreshScores(follow=config.out)) == 0


@pytest.mark.parametrize("attention", ["off", "live", "rolling"])
def test_the_same_seed_gives_the_same_weights(config, tmp_path, attention):
    config = dataclasses.replace(config, attention=AttentionConfig(attention))
    main(config)
    main(dataclasses.replace(config, out=tmp_path / "again"))
    main(dataclasses.replace(config, out=tmp_path / "other", seed=1))
    assert _equal(_weights(config.out), _weights(tmp_path / "again"))
    assert not _equal(_weights(config.out), _weights(tmp_path / "other"))


def test_a_run_reads_its_tars_from_where_they_are_staged(config, scored, tmp_path):
    config = dataclasses.replace(config, epochs=1, stage=tmp_path / "disk", monitor=scored.shards)
    main(config)
    assert len(list((tmp_path / "disk").glob("*.tar"))) == 3
    main(dataclasses.replace(config, out=tmp_path / "unstaged", stage=None))
    assert _equal(_weights(config.out), _weights(tmp_path / "unstaged"))


def _log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_has_a_line_a_log_point_and_one_an_event(config):
    main(dataclasses.replace(config, log_steps=2, checkpoint_minutes=0.0))
    lines = _log(config.out)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 9]
    assert [line["epoch"] for line in lines if "loss" in line] == [0, 1, 1, 2, 2]
    assert [line["event"] for line in lines if "event" in line] == [
        "start",
        *(5 * ["checkpoint"]),
        "finished",
    ]
    for line in lines:
        if "loss" in line:
            shares = [value for name, value in line.items() if name.startswith("time/")]
            assert 0 < sum(shares) <= 1.001


def test_a_resumed_run_leaves_one_story_in_its_log(config):
    main(dataclasses.replace(config, checkpoint_minutes=0.0, keep_checkpoints=9))
    for path in sorted(config.out.glob("checkpoint-*.pt"))[4:]:
        path.unlink()
    with open(config.out / "log.jsonl", "a") as file:
        file.write('{"step": 1, "cut o')
    main(config)
    assert [line["step"] for line in _log(config.out) if "loss" in line] == list(range(1, 10))


def test_plain_epochs_are_those_of_a_plain_mae(config, tmp_path):
    mae = parse(["--recipe=mae", "--shards", "a", "--cache", "c", "--out", "o"], None)
    plain = dataclasses.replace(config, out=tmp_path / "mae", join=mae.join, epochs=2, **OFF)
    main(dataclasses.replace(plain, checkpoint_minutes=0.0, keep_checkpoints=9))
    late = dataclasses.replace(config, plain_epochs=1, epochs=2)
    main(dataclasses.replace(late, checkpoint_minutes=0.0, keep_checkpoints=9))

    def weights(folder, step):
        return checkpoint.load(folder / f"checkpoint-{step:08d}.pt").model

    assert _equal(weights(plain.out, 3), weights(config.out, 3))
    assert not _equal(weights(plain.out, 6), weights(config.out, 6))
    assert (
        checkpoint.load(config.out).signals["attention"]["refreshed"] >= 0
    ).sum() == 3  # of one epoch


def test_clipping_bounds_the_gradients(config):
    clipped = dataclasses.replace(config.optimiser, clip_norm=1e-3)
    with join_ranks("cpu") as ranks:
        run = Run(dataclasses.replace(config, optimiser=clipped), ranks)
        norms = []
        run.optimisation.optimizer.step = lambda: norms.append(
            torch.cat([p.grad.flatten() for p in run.model.parameters() if p.requires_grad]).norm()
        )
        run.forward_backward(run.prepare(next(iter(run.loader)), 0))
        run.update()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_the_moving_average_is_that_of_the_encoders_weights(config):
    averaged = dataclasses.replace(config.optimiser, ema_decay=0.5)
    config = dataclasses.replace(
        config, optimiser=averaged, epochs=1, checkpoint_minutes=0.0, keep_checkpoints=9
    )
    with join_ranks("cpu") as ranks:
        expected = Run(config, ranks).model.encoder.blocks[0].attn.qkv.weight.detach().clone()
    main(config)
    for step in range(1, 4):
        state = checkpoint.load(config.out / f"checkpoint-{step:08d}.pt")
        expected = 0.5 * expected + 0.5 * state.model["encoder.blocks.0.attn.qkv.weight"]
        torch.testing.assert_close(state.ema["blocks.0.attn.qkv.weight"], expected)
    model = checkpoint.load_model(config.out, ema=True)
    assert torch.equal(
        model.encoder.blocks[0].attn.qkv.weight, state.ema["blocks.0.attn.qkv.weight"]
    )


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_same_model(config, tmp_path):
    config = dataclasses.replace(config, epochs=1, optimiser=OptimiserConfig(1e-3))
    main(config)
    main(dataclasses.replace(config, out=tmp_path / "compiled", compile=True))
    for name, value in _weights(tmp_path / "compiled").items():
        torch.testing.assert_close(value, _weights(config.out)[name], atol=1e-4, rtol=1e-3)


def test_never_resuming_refuses_a_folder_with_checkpoints(config):
    main(config)
    with pytest.raises(ValueError, match="--resume never"):
        main(dataclasses.replace(config, resume="never"))


@pytest.mark.parametrize(("batch_size", "steps_an_epoch"), [(4, 4), (17, 1)])
def test_an_elastic_run_goes_on_from_the_beginning_of_its_epoch(config, batch_size, steps_an_epoch):
    main(dataclasses.replace(config, checkpoint_minutes=0.0, keep_checkpoints=9))
    for path in sorted(config.out.glob("checkpoint-*.pt"))[5:]:
        path.unlink()  # the last is in the middle of the second epoch
    fewer = dataclasses.replace(config, shards=config.shards[:2], batch_size=batch_size)
    with pytest.raises(ValueError, match=rf"batch_size: 8 -> {batch_size}; data: .* or --elastic"):
        main(fewer)
    before = _weights(config.out)
    with join_ranks("cpu") as ranks:
        run = Run(dataclasses.replace(fewer, elastic=True), ranks)
        assert (run.step, run.loader.epoch) == (5, 1)
        assert run.last_step == 5 + 2 * steps_an_epoch  # 17 images
        assert _equal(run.model.state_dict(), before)
    main(dataclasses.replace(fewer, elastic=True))
    last = checkpoint.load(config.out)
    assert (last.step, last.epoch) == (run.last_step, 3)
    assert not _equal(last.model, before)
    main(fewer)  # which is now exactly the run that the folder holds
    assert checkpoint.load(config.out).step == run.last_step
    steps = [line["step"] for line in _log(config.out) if "loss" in line]
    assert steps == list(range(1, run.last_step + 1))


def test_two_runs_in_one_folder_are_refused(config):
    with (
        own_folder(config.out),
        pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on"),
    ):
        main(config)
    main(dataclasses.replace(config, epochs=1))


def test_garbage_in_the_log_stops_no_run(config):
    config.out.mkdir(exist_ok=True)
    (config.out / "log.jsonl").write_bytes(b'\xff{"step": null}\n{"step": null}\n[1]\n')
    main(dataclasses.replace(config, epochs=1))
    assert [line["step"] for line in _log(config.out) if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plain_epochs": -1}, "--plain-epochs -1"),
        ({"threads": 0}, "--threads 0"),
        ({"content": ContentConfig(exponent=float("nan"))}, "--content.exponent nan"),
        ({"optimiser": OptimiserConfig(ema_decay=1.5)}, "--optimiser.ema-decay 1.5"),
        ({"attention": AttentionConfig(image_size=30)}, "--attention.image-size 30 must be a mult"),
        ({"batch_size": 9, "accumulate": 2}, "does not divide"),
        ({"batch_size": 8, "crops_per_image": 3}, "not made of images with --crops-per-image 3"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(config, options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **options)


def test_a_run_goes_on_from_before_a_damaged_checkpoint_and_says_so(config, tmp_path, capsys):
    config = dataclasses.replace(config, checkpoint_minutes=0.0, keep_checkpoints=9)
    main(config)
    whole = _weights(config.out)
    for step in (8, 9):
        path = config.out / f"checkpoint-{step:08d}.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    main(config)
    assert "checkpoint-00000009.pt is damaged; going on from checkpoint-00000007.pt" in (
        capsys.readouterr().err
    )
    assert _equal(_weights(config.out), whole)
    said = [line for line in _log(config.out) if line.get("event") == "damaged checkpoint"]
    assert [(line["step"], line["file"]) for line in said] == [
        (7, "checkpoint-00000009.damaged"),
        (7, "checkpoint-00000008.damaged"),
    ]


def test_a_run_of_damaged_checkpoints_alone_does_not_begin_anew_unasked(config):
    main(dataclasses.replace(config, epochs=1))
    (path,) = config.out.glob("checkpoint-*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"00000003\.pt is damaged .* remove it to begin anew"):
        main(dataclasses.replace(config, epochs=1))


def test_another_model_is_refused_even_by_an_elastic_run(config):
    main(dataclasses.replace(config, epochs=1))
    with pytest.raises(ValueError, match="model: vit_nano -> vit_micro"):
        main(dataclasses.replace(config, model="vit_micro", elastic=True))


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("attention", "crops_per_image", "epochs"), [("rolling", 2, 2), ("off", 1, 3)]
)
def test_a_run_stopped_anywhere_ends_with_the_weights_of_one_that_was_not(
    config, tmp_path, stop_after, attention, crops_per_image, epochs, monkeypatch
):
    config = dataclasses.replace(
        config,
        attention=AttentionConfig(attention, every=2, image_size=16),
        crops_per_image=crops_per_image,
        epochs=epochs,
    )
    main(config)
    interrupted = dataclasses.replace(config, out=tmp_path / "stopped", checkpoint_minutes=0.0)
    original = Run.update

    def stopping(run):
        if run.step == stop_after:
            raise _Stop
        original(run)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(_Stop):
        main(interrupted)
    monkeypatch.undo()
    assert checkpoint.load(interrupted.out).step == stop_after
    main(interrupted)
    assert _equal(_weights(config.out), _weights(interrupted.out))


def test_a_finished_run_is_left_alone(config):
    main(config)
    before = checkpoint.latest(config.out).stat()
    main(config)
    after = checkpoint.latest(config.out).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_run_in_the_same_folder_is_refused(config):
    main(config)
    with pytest.raises(ValueError, match="batch_size: 8 -> 4"):
        main(dataclasses.replace(config, batch_size=4))


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_own_samples(config, monkeypatch):
    config = dataclasses.replace(config, log_steps=4)
    original, batches = Run.forward_backward, []

    def poisoned(run, batch):
        batches.append([run.samples.key(row) for row in batch.views.rows.tolist()])
        if run.step == 1:
            batch = dataclasses.replace(batch, visible=batch.visible.float() * float("inf"))
        return original(run, batch)

    monkeypatch.setattr(Run, "forward_backward", poisoned)
    with pytest.raises(FloatingPointError, match="at step 2; the samples are in"):
        main(config)
    (record,) = config.out.glob("nan-rank0-step00000002.txt")
    assert record.read_text().splitlines() == batches[1]
    assert all(".tar:img" in name for name in batches[1])
    assert checkpoint.latest(config.out) is None


def _with(config, **options):
    return dataclasses.replace(config, optimiser=dataclasses.replace(config.optimiser, **options))


def test_a_run_that_ran_away_goes_on_as_its_message_says(config):
    config = dataclasses.replace(config, checkpoint_minutes=0.0, keep_checkpoints=9)
    with pytest.raises(FloatingPointError) as stopped:
        main(_with(config, base_learning_rate=1e30))
    for remedy in (
        "a lower --optimiser.base-learning-rate and --elastic",
        "remove that checkpoint",
    ):
        assert remedy in str(stopped.value)
    *_, before, last = sorted(config.out.glob("checkpoint-*.pt"))
    last.unlink()  # it holds the weights that ran away
    lower = dataclasses.replace(
        _with(config, base_learning_rate=0.04, weight_decay=0.3), elastic=True
    )
    with join_ranks("cpu") as ranks:
        run = Run(lower, ranks)
        assert run.step == checkpoint.load(before).step
        assert {group["weight_decay"] for group in run.optimisation.optimizer.param_groups} == {
            0.0,
            0.3,
        }
        run.optimisation.schedule.step_update(run.optimisation.warmup_steps)
        assert run.optimisation.optimizer.param_groups[0]["lr"] == pytest.approx(0.04 * 8 / 256)
    main(lower)
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
    (line,) = [each for each in _log(tmp_path / "run") if "loss" in each]
    means = [float((tmp_path / f"loss{rank}.txt").read_text()) for rank in range(2)]
    assert means[0] != means[1]
    assert line["loss"] == pytest.approx(sum(means) / 2, rel=1e-6)


def test_live_attention_changes_the_masks_and_leaves_the_gradients_alone(config):
    with join_ranks("cpu") as ranks:
        run = Run(dataclasses.replace(config, attention=AttentionConfig("live")), ranks)
        crops = next(iter(run.loader))
        run.prepare(crops, 0)
        assert run.model.training
        assert all(p.grad is None for p in run.model.parameters())


def test_plain_mae_needs_no_score_maps(config, scored, tmp_path):
    arguments = ["--recipe", "mae", "--shards", *scored.shards, "--cache", "c", "--out", "o"]
    parsed = parse(arguments, None)
    assert parsed.join == JoinConfig(0.75, 0.0)
    assert (parsed.content.source, parsed.attention.source) == ("off", "off")
    config = dataclasses.replace(
        config, join=parsed.join, cache=str(tmp_path / "unscored"), epochs=1, **OFF
    )
    main(config)
    assert checkpoint.load(config.out).signals == {}


def test_single_options_override_the_recipe():
    base = ["--shards", "a", "--cache", "c", "--out", "o"]
    mae = parse([*base, "--recipe=mae", "--join.mask-ratio", "0.6"], None)
    assert mae.join == JoinConfig(0.6, 0.0)


def test_a_run_of_any_sizes_is_rebuilt_from_its_checkpoint_alone(config):
    sizes = {"image_size": 24, "patch_size": 8, "decoder": "cross", "decoder_depth": 1}
    main(dataclasses.replace(config, epochs=1, **sizes))
    model = checkpoint.load_model(config.out)
    assert (model.config.grid, model.config.width, len(model.decoder_blocks)) == (3, 96, 1)
    assert checkpoint.load(config.out).method == "mae"
    assert checkpoint.load_encoder(config.out).build().patch_embed.grid_size == (3, 3)


def test_a_size_on_the_command_line_overrides_the_models():
    base = ["--recipe=mae", "--shards=a", "--cache=c", "--out=o", "--model=vit_small"]
    assert parse(base, None).sizes == MODELS["vit_small"]
    given = parse([*base, "--image-size", "96", "--patch-size", "8"], None).sizes
    assert (given.grid, given.width, given.depth) == (12, 384, 12)
    with pytest.raises(ValueError, match="96 is no multiple of patch size 7"):
        Pretrain([], "c", Path("o"), image_size=96, patch_size=7)


@pytest.mark.parametrize(
    ("recipe", "patches"),
    [
        ("famt-simmim", "28 masked (28 predicted) + 16 thrown + 20 visible, in squares of 2 x 2"),
        ("simmim", "36 masked (36 predicted) + 0 thrown + 28 visible, in squares of 2 x 2"),
    ],
)
def test_simmim_learns_and_is_drawn(config, recipe, patches, capsys):
    told = parse(["--recipe", recipe, "--shards", "a", "--cache", "c", "--out", "o"], None)
    names = ("method", "join", "content", "attention")
    options = {name: getattr(told, name) for name in names}
    main(dataclasses.replace(config, epochs=8, low_pass=8.0, fused=(1, 3), **options))
    assert f"64 = {patches}" in capsys.readouterr().out
    losses = [event.value for event in EventAccumulator(str(config.out)).Reload().Scalars("loss")]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    assert checkpoint.load(config.out).method == "simmim"
    model = checkpoint.load_model(config.out)
    assert (model.config.unit, model.config.low_pass, model.config.fused) == (2, 8.0, (1, 3))


def test_before_its_weights_a_method_masks_as_its_paper(config):
    for method, masked in (("mae", 48), ("simmim", 36)):
        with join_ranks("cpu") as ranks:
            run = Run(dataclasses.replace(config, method=method, plain_epochs=1), ranks)
            split = run.prepare(next(iter(run.loader)), 0).split
        assert (split.masked.shape[1], split.thrown.shape[1]) == (masked, 0)


def test_weights_count_more_as_the_run_goes_on(config):
    with join_ranks("cpu") as ranks:
        join = JoinConfig(blend=(0.0, 1.0))
        run = Run(
            dataclasses.replace(
                config, attention=AttentionConfig("live"), join=join, content=ContentConfig("off")
            ),
            ranks,
        )
        crops, total_steps = next(iter(run.loader)), run.optimisation.total_steps
        heavy = torch.zeros(8, 64)
        heavy[:, :28] = 1.0
        run.signals[0].read = lambda crops, step: heavy
        shares = [
            heavy.gather(1, run.prepare(crops, step).split.masked).mean().item()
            for step in (0, total_steps // 2, total_steps)
        ]
    assert shares[0] == pytest.approx(28 / 64, abs=0.12)
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_bf16_trains(config):
    main(dataclasses.replace(config, precision="bf16", epochs=1))
    assert all(torch.isfinite(value).all() for value in _weights(config.out).values())


def _command(config, *more):
    return [
        "-m", "train.pretrain", "--shards", *config.shards, "--cache", config.cache,
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
    moments, hits = random.Random(0), 0
    for _ in range(KILLS):
        before = checkpoint.latest(out) if out.exists() else None
        process = subprocess.Popen(command(out), start_new_session=True, **quiet)
        while process.poll() is None and (not out.exists() or checkpoint.latest(out) == before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is None:
            hits += 1
            _kill(process)
    assert hits == KILLS  # a run that had ended would prove nothing
    subprocess.run(command(out), check=True, timeout=300, **quiet)
    assert _equal(_weights(whole), _weights(out))
    state = checkpoint.load(out)
    assert state.step == 40 * 6 // world_size  # 26 samples in batches of 4 a rank
    assert len(state.ranks) == world_size
    json.dumps(state.config)


def _kill(process):
    """SIGKILL a run; torchrun's workers lead sessions of their own."""
    workers = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *workers):
        each.kill()
    process.wait()
    psutil.wait_procs(workers)


@pytest.mark.slow
def test_two_machines_with_rolling_attention_resume_to_the_bit(config):
    command = _command(config, "--keep-checkpoints", "99", "--attention.every", "2")

    def run():
        finish(launch(command[1], *command[2:], "--out", str(config.out), machines=["a", "b"]))

    run()
    whole = checkpoint.load(config.out)
    for path in sorted(config.out.glob("checkpoint-*.pt"))[4:]:
        path.unlink()  # what is left ends in the middle of the second epoch
    run()
    resumed = checkpoint.load(config.out)
    assert resumed.step == whole.step == 18
    assert _equal(resumed.model, whole.model)
    assert _equal(resumed.signals["attention"], whole.signals["attention"])


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_makes_a_run_checkpoint_and_leave_with_0(config, tmp_path, asked):
    whole = [sys.executable, *_command(config, "--out", str(tmp_path / "whole"))]
    subprocess.run(whole, check=True, capture_output=True)
    stopped, out = [], tmp_path / "stopped"
    for checkpoints in ("999", "999", None):
        options = ["--checkpoint-minutes", checkpoints] if checkpoints else []
        command = [sys.executable, *_command(config, "--out", str(out), *options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        known = len(_losses(out))
        while checkpoints and process.poll() is None and len(_losses(out)) < known + 3:
            time.sleep(0.01)
        if checkpoints:
            process.send_signal(asked)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        stopped.append(checkpoint.load(out).step)
    assert 3 <= stopped[0] < stopped[1] < stopped[2]
    assert "stopped by a signal" in (out / "log.jsonl").read_text()
    assert _equal(_weights(tmp_path / "whole"), _weights(out))


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
    while len(_losses(config.out)) < 3:
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
        assert checkpoint.load(config.out).step == len(_losses(config.out))
    else:
        assert codes == [-9 if each == rank else 2 for each in range(len(machines))]
        name = f"error: rank {rank} (process {processes[rank].pid} on "
        assert all(name in text for each, text in enumerate(said) if each != rank)


def _losses(folder):
    path = folder / "log.jsonl"
    return (  # of log points; a start's options have "loss_exponent"
        [line for line in path.read_text().splitlines() if '"loss":' in line]
        if path.exists()
        else []
    )


@pytest.mark.gpu
def test_a_gpu_trains_under_bf16_with_live_attention(config):
    config = dataclasses.replace(
        config, device="cuda", precision="bf16", attention=AttentionConfig("live")
    )
    main(config)
    assert all(torch.isfinite(value).all() for value in _weights(config.out).values())


def test_a_run_begins_with_the_weights_of_another(config, tiny_run, tmp_path, monkeypatch):
    """Positions are interpolated; a resumed run does not read the source any more."""
    source = tmp_path / "source"
    shutil.copytree(tiny_run, source)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, init="source", image_size=64, patch_size=8, epochs=1)
    with join_ranks("cpu") as ranks:
        run = Run(config, ranks)
        theirs = checkpoint.load_model(tiny_run)
        for name, value in theirs.state_dict().items():
            if "pos_embed" not in name:
                assert torch.equal(run.model.state_dict()[name], value), name
        assert run.model.encoder.pos_embed.shape == (1, 65, 96)
        assert "pos_embed (6 x 6 patches to 8 x 8)" in run.plan()
    main(config)
    shutil.rmtree(source)
    main(config)
    with pytest.raises(ValueError, match=r"other options \(init: "):
        main(dataclasses.replace(config, init=None))


def test_weights_of_another_width_to_begin_with_are_refused(config, tiny_run):
    with pytest.raises(
        ValueError, match="has width 96 and depth 6, and this model's has width 192"
    ):
        main(dataclasses.replace(config, model="vit_micro", init=str(tiny_run)))
