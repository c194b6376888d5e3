import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from runs import equal, log_lines, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.jobs.options import RefreshScores
from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.pipeline.options import JoinConfig
from famt.train import checkpoint
from famt.train.command_line import parse
from famt.train.config import OptimiserConfig, Pretrain
from famt.train.side_stream import _tensors
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.signals.refresh_folder import load_encoder

OFF = {"frequency": FrequencyConfig("off"), "attention": AttentionConfig("off")}
EVERY_STEP = {"checkpoint_minutes": 0.0, "keep_checkpoints": 9}


def _parse(*options):
    return parse([*options, "--shards", "a", "--cache", "c", "--out", "o"], None)


def _losses(out):
    return [event.value for event in EventAccumulator(str(out)).Reload().Scalars("loss")]


def test_a_run_learns_and_leaves_checkpoint_and_curves(train, capsys):
    out = train(epochs=12)
    assert checkpoint.load(out).step == 36
    events, losses = EventAccumulator(str(out)).Reload(), _losses(out)
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


def test_without_signals_options_of_weights_are_told_to_have_no_effect(train, capsys):
    join = JoinConfig(throw_ratio=0.3, visible="uniform", loss_exponent=1.0)
    out = train(**OFF, join=join, epochs=1)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    for option in ("--join.visible", "--join.loss-exponent", "--spec.grid"):
        assert option in told
    assert "throw-ratio" not in told
    # Nor has a job that follows the run anything to wait for.
    from famt.jobs.refresh_scores import follow  # needs Ray, and GPU tests of this file do not

    assert follow(out, RefreshScores(follow=out)) == 0


@pytest.mark.parametrize("attention", ["off", "live", "rolling"])
def test_the_same_seed_gives_the_same_weights(train, tmp_path, attention):
    slot = AttentionConfig(attention)
    first, again, other = (
        weights(train(attention=slot, out=tmp_path / name, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_a_run_reads_its_tars_from_where_they_are_staged(train, scored, tmp_path):
    out = train(epochs=1, stage=tmp_path / "disk", monitor=scored.shards)
    assert len(list((tmp_path / "disk").glob("*.tar"))) == 3
    unstaged = train(epochs=1, out=tmp_path / "unstaged", monitor=scored.shards)
    assert equal(weights(out), weights(unstaged))


def test_the_log_has_a_line_a_log_point_and_one_an_event(train):
    lines = log_lines(train(log_steps=2, checkpoint_minutes=0.0))
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


def test_plain_epochs_are_those_of_a_plain_mae(train, tmp_path):
    mae = _parse("--recipe=mae")
    plain = train(out=tmp_path / "mae", join=mae.join, epochs=2, **OFF, **EVERY_STEP)
    late = train(plain_epochs=1, epochs=2, **EVERY_STEP)
    for step, same in ((3, True), (6, False)):
        name = f"checkpoint-{step:08d}.pt"
        assert equal(weights(plain / name), weights(late / name)) == same
    written = checkpoint.load(late).components["attention"]["refreshed"] >= 0
    assert written.sum() == 3  # of one epoch


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_same_model(train, tmp_path):
    options = {"epochs": 1, "optimiser": OptimiserConfig(1e-3)}
    expected = weights(train(**options))
    found = weights(train(out=tmp_path / "compiled", compile=True, **options))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


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


def test_live_attention_leaves_the_gradients_alone(begin):
    run = begin(attention=AttentionConfig("live"))
    run.prepare(next(iter(run.loader)), 0)
    assert run.model.training
    assert all(p.grad is None for p in run.model.parameters())


def test_plain_mae_needs_no_score_maps(train, tmp_path):
    join = _parse("--recipe=mae").join
    out = train(join=join, cache=str(tmp_path / "unscored"), epochs=1, **OFF)
    assert checkpoint.load(out).components.keys() == {"model", "optimisation"}


def test_a_run_of_any_sizes_is_rebuilt_from_its_checkpoint_alone(train):
    sizes = {"image_size": 24, "patch_size": 8, "decoder": "cross", "decoder_depth": 1}
    out = train(epochs=1, **sizes)
    model = checkpoint.load_model(out)
    assert (model.config.grid, model.config.width, len(model.decoder_blocks)) == (3, 96, 1)
    assert checkpoint.load(out).method == "mae"
    assert load_encoder(out).build().patch_embed.grid_size == (3, 3)


def test_a_size_on_the_command_line_overrides_the_models():
    base = "--recipe=mae", "--model=vit_small"
    assert _parse(*base).sizes == MODELS["vit_small"]
    given = _parse(*base, "--image-size", "96", "--patch-size", "8").sizes
    assert (given.grid, given.width, given.depth) == (12, 384, 12)
    with pytest.raises(UserError, match="--image-size 96 must be a multiple of the patch size, 7"):
        Pretrain(shards=[], cache="c", out=Path("o"), image_size=96, patch_size=7)


@pytest.mark.parametrize(
    ("recipe", "patches"),
    [
        ("famt-simmim", "28 masked (28 predicted) + 16 thrown + 20 visible, in squares of 2 x 2"),
        ("simmim", "36 masked (36 predicted) + 0 thrown + 28 visible, in squares of 2 x 2"),
    ],
)
def test_simmim_learns_and_is_drawn(train, recipe, patches, capsys):
    told = _parse("--recipe", recipe)
    names = ("method", "join", "frequency", "attention")
    options = {name: getattr(told, name) for name in names}
    out = train(epochs=8, low_pass=8.0, fused=(1, 3), **options)
    assert f"64 = {patches}" in capsys.readouterr().out
    losses = _losses(out)
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    assert checkpoint.load(out).method == "simmim"
    model = checkpoint.load_model(out)
    assert (model.config.unit, model.config.low_pass, model.config.fused) == (2, 8.0, (1, 3))


def test_before_its_weights_a_method_masks_as_its_paper(begin):
    for method, masked in (("mae", 48), ("simmim", 36)):
        run = begin(method=method, plain_epochs=1)
        split = run.prepare(next(iter(run.loader)), 0).split
        assert (split.masked.shape[1], split.thrown.shape[1]) == (masked, 0)


def test_weights_count_more_as_the_run_goes_on(begin):
    run = begin(
        attention=AttentionConfig("live"),
        frequency=FrequencyConfig("off"),
        join=JoinConfig(blend=(0.0, 1.0)),
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


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_a_prepared_batch_holds_none_of_the_loaders_memory(begin, method):
    """`SideStream.hand_over` keeps torch's memory for the main stream, and can't keep DALI's."""
    run = begin(method=method)
    crops = next(iter(run.loader))
    (whole, *_), batch = _storages(crops), run.prepare(crops, 0)
    assert whole == crops.images.untyped_storage().data_ptr()
    assert whole not in _storages(batch)


def _storages(batch):
    return [each.untyped_storage().data_ptr() for each in _tensors(batch)]


@pytest.mark.parametrize(
    ("device", "attention"),
    [("cpu", "rolling"), pytest.param("cuda", "live", marks=pytest.mark.gpu)],
)
def test_bf16_trains(train, device, attention):
    out = train(precision="bf16", device=device, attention=AttentionConfig(attention), epochs=1)
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_a_run_begins_with_the_weights_of_another(config, train, begin, tiny_run, monkeypatch):
    """Positions are interpolated; a resumed run does not read the source any more."""
    shutil.copytree(tiny_run, config.out.parent / "source")
    monkeypatch.chdir(config.out.parent)
    options = {"init": "source", "image_size": 64, "patch_size": 8, "epochs": 1}
    run = begin(**options)
    theirs = checkpoint.load_model(tiny_run)
    for name, value in theirs.state_dict().items():
        if "pos_embed" not in name:
            assert torch.equal(run.model.state_dict()[name], value), name
    assert run.model.encoder.pos_embed.shape == (1, 65, 96)
    assert "pos_embed (6 x 6 patches to 8 x 8)" in run.plan()
    train(**options)
    shutil.rmtree("source")
    train(**options)
    with pytest.raises(UserError, match=r"other options \(init: "):
        train(**options | {"init": None})


def test_weights_of_another_width_to_begin_with_are_refused(train, tiny_run):
    with pytest.raises(UserError, match="has width 96 and depth 6, and this model's has width 192"):
        train(model="vit_micro", init=str(tiny_run))
