import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from runs import equal, log_lines, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.pipeline.options import JoinConfig
from famt.train import checkpoint
from famt.train.command_line import parse
from famt.train.config import OptimiserConfig, Pretrain
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run, main
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.signals.refresh_folder import load_encoder

OFF = {"frequency": FrequencyConfig("off"), "attention": AttentionConfig("off")}


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
    from famt.jobs.options import RefreshScores
    from famt.jobs.refresh_scores import follow

    assert follow(config.out, RefreshScores(follow=config.out)) == 0


@pytest.mark.parametrize("attention", ["off", "live", "rolling"])
def test_the_same_seed_gives_the_same_weights(config, tmp_path, attention):
    config = dataclasses.replace(config, attention=AttentionConfig(attention))
    main(config)
    main(dataclasses.replace(config, out=tmp_path / "again"))
    main(dataclasses.replace(config, out=tmp_path / "other", seed=1))
    assert equal(weights(config.out), weights(tmp_path / "again"))
    assert not equal(weights(config.out), weights(tmp_path / "other"))


def test_a_run_reads_its_tars_from_where_they_are_staged(config, scored, tmp_path):
    config = dataclasses.replace(config, epochs=1, stage=tmp_path / "disk", monitor=scored.shards)
    main(config)
    assert len(list((tmp_path / "disk").glob("*.tar"))) == 3
    main(dataclasses.replace(config, out=tmp_path / "unstaged", stage=None))
    assert equal(weights(config.out), weights(tmp_path / "unstaged"))


def test_the_log_has_a_line_a_log_point_and_one_an_event(config):
    main(dataclasses.replace(config, log_steps=2, checkpoint_minutes=0.0))
    lines = log_lines(config.out)
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


def test_plain_epochs_are_those_of_a_plain_mae(config, tmp_path):
    mae = parse(["--recipe=mae", "--shards", "a", "--cache", "c", "--out", "o"], None)
    plain = dataclasses.replace(config, out=tmp_path / "mae", join=mae.join, epochs=2, **OFF)
    main(dataclasses.replace(plain, checkpoint_minutes=0.0, keep_checkpoints=9))
    late = dataclasses.replace(config, plain_epochs=1, epochs=2)
    main(dataclasses.replace(late, checkpoint_minutes=0.0, keep_checkpoints=9))

    def weights(folder, step):
        return checkpoint.load(folder / f"checkpoint-{step:08d}.pt").model

    assert equal(weights(plain.out, 3), weights(config.out, 3))
    assert not equal(weights(plain.out, 6), weights(config.out, 6))
    assert (
        checkpoint.load(config.out).signals["attention"]["refreshed"] >= 0
    ).sum() == 3  # of one epoch


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_same_model(config, tmp_path):
    config = dataclasses.replace(config, epochs=1, optimiser=OptimiserConfig(1e-3))
    main(config)
    main(dataclasses.replace(config, out=tmp_path / "compiled", compile=True))
    for name, value in weights(tmp_path / "compiled").items():
        torch.testing.assert_close(value, weights(config.out)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": AttentionConfig(image_size=30)}, "--attention.image-size 30 must be a mult"),
        ({"batch_size": 9, "accumulate": 2}, "multiple of --accumulate 2"),
        ({"batch_size": 8, "crops_per_image": 3}, "multiple of --crops-per-image 3"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(config, options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **options)


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
    assert (parsed.frequency.source, parsed.attention.source) == ("off", "off")
    config = dataclasses.replace(
        config, join=parsed.join, cache=str(tmp_path / "unscored"), epochs=1, **OFF
    )
    main(config)
    assert checkpoint.load(config.out).signals == {}


def test_a_run_of_any_sizes_is_rebuilt_from_its_checkpoint_alone(config):
    sizes = {"image_size": 24, "patch_size": 8, "decoder": "cross", "decoder_depth": 1}
    main(dataclasses.replace(config, epochs=1, **sizes))
    model = checkpoint.load_model(config.out)
    assert (model.config.grid, model.config.width, len(model.decoder_blocks)) == (3, 96, 1)
    assert checkpoint.load(config.out).method == "mae"
    assert load_encoder(config.out).build().patch_embed.grid_size == (3, 3)


def test_a_size_on_the_command_line_overrides_the_models():
    base = ["--recipe=mae", "--shards=a", "--cache=c", "--out=o", "--model=vit_small"]
    assert parse(base, None).sizes == MODELS["vit_small"]
    given = parse([*base, "--image-size", "96", "--patch-size", "8"], None).sizes
    assert (given.grid, given.width, given.depth) == (12, 384, 12)
    with pytest.raises(UserError, match="96 is no multiple of patch size 7"):
        Pretrain(shards=[], cache="c", out=Path("o"), image_size=96, patch_size=7)


@pytest.mark.parametrize(
    ("recipe", "patches"),
    [
        ("famt-simmim", "28 masked (28 predicted) + 16 thrown + 20 visible, in squares of 2 x 2"),
        ("simmim", "36 masked (36 predicted) + 0 thrown + 28 visible, in squares of 2 x 2"),
    ],
)
def test_simmim_learns_and_is_drawn(config, recipe, patches, capsys):
    told = parse(["--recipe", recipe, "--shards", "a", "--cache", "c", "--out", "o"], None)
    names = ("method", "join", "frequency", "attention")
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
                config,
                attention=AttentionConfig("live"),
                join=join,
                frequency=FrequencyConfig("off"),
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
    assert all(torch.isfinite(value).all() for value in weights(config.out).values())


@pytest.mark.gpu
def test_a_gpu_trains_under_bf16_with_live_attention(config):
    config = dataclasses.replace(
        config, device="cuda", precision="bf16", attention=AttentionConfig("live")
    )
    main(config)
    assert all(torch.isfinite(value).all() for value in weights(config.out).values())


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
    with pytest.raises(UserError, match=r"other options \(init: "):
        main(dataclasses.replace(config, init=None))


def test_weights_of_another_width_to_begin_with_are_refused(config, tiny_run):
    with pytest.raises(UserError, match="has width 96 and depth 6, and this model's has width 192"):
        main(dataclasses.replace(config, model="vit_micro", init=str(tiny_run)))
