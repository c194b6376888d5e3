import dataclasses
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from launch import finish, kill_at_random, launch, program_file
from runs import equal, log_events, log_lines, log_points, weights
from samples import RANKS, encode, tar_bytes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.patches import normalise_images
from famt.pipeline.errors import UserError
from famt.pipeline.options import RandomView
from famt.train import checkpoint
from famt.train.embed import main as embed
from famt.train.evaluate.evaluators.finetune import (
    Finetune,
    FinetuneOptimiser,
    FinetuneView,
    Mixing,
)
from famt.train.evaluate.features import Images, open_images
from famt.train.evaluate.finetuning import Finetuning
from famt.train.evaluate.run import open_encoder
from famt.train.evaluate.run import run as evaluate
from famt.train.export import main as export
from famt.train.program_options import Embed, Export

MIXED = Mixing().resolved(100)
PLAIN = Mixing(randaugment="", mixup=0, cutmix=0, label_smoothing=0, drop_path=0)


@pytest.fixture
def make(tmp_path, scored, options):
    """Options of a run on 24 images of two colours: 12 steps in 2 epochs unless said otherwise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 9)):
        members = []
        for n in range(count):
            image = rng.integers(0, 60, (36, 36, 3), dtype=np.uint8)
            image[..., n % 2] += 150
            members += [(f"{n}.png", encode(image, "PNG")), (f"{n}.cls", b"%d" % (n % 2))]
        (tmp_path / f"{split}.tar").write_bytes(tar_bytes(members))
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")

    def make(out="tuned", **others):
        known = {
            "checkpoint": str(tmp_path / "encoder.pth"), "train": [str(tmp_path / "train.tar")],
            "val": [str(tmp_path / "val.tar")], "batch_size": 4, "epochs": 2, "log_steps": 1,
            "mixing": MIXED, "optimiser": FinetuneOptimiser(0.05, ema_decay=0.5, warmup_epochs=1),
            "out": tmp_path / out,
        }  # fmt: skip
        return options(Finetune, **(known | others))

    return make


def test_a_run_learns_and_leaves_checkpoint_log_and_curves(make, capsys):
    values = evaluate(make(epochs=6, mixing=PLAIN, head="zero"))
    assert values["top1"] == 1.0
    assert values.keys() == {"top1", "stderr", "top1_ema", "stderr_ema", "epochs"}
    out = make().out
    assert checkpoint.load(out).step == 36
    lines = log_lines(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 36
    assert losses[0] == pytest.approx(np.log(2), abs=0.01)  # the classifier begins near zero
    assert sum(losses[-3:]) < 0.2 * sum(losses[:3])
    tests = [line for line in lines if line.get("event") == "evaluation"]
    assert [line["step"] for line in tests] == [6, 12, 18, 24, 30, 36]
    assert tests[-1]["top1"] == 1.0
    told = capsys.readouterr().out
    assert "36 = 6 epochs x 6, 6 of warm-up; 0 done" in told
    assert re.search(r"^  top-1 +100\.0 ± 0\.0 %$", told, re.M)
    assert "val/top1" in EventAccumulator(str(out)).Reload().Tags()["scalars"]


def test_the_head_begins_as_a_discriminant_of_what_the_encoder_sees(make):
    none = FinetuneOptimiser(base_learning_rate=1e-9)
    values = evaluate(make(epochs=1, mixing=PLAIN, optimiser=none))
    assert values["top1"] == 1.0  # by features alone: nothing was learned since


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fine_tuned_run_is_exported_with_its_head_and_embedded(make, tmp_path, scored, pooling):
    evaluate(make(epochs=1, pooling=pooling))
    assert max(line["loss"] for line in log_points(make().out)) < 2  # not far too sure
    tuned = checkpoint.load_classifier(make().out)
    average = checkpoint.load_classifier(make().out, ema=True)
    assert not torch.equal(tuned.head.weight, average.head.weight)
    pixels = torch.randn(2, 3, 32, 32)
    lines = export(Export(make().out, "timm", tmp_path / "exported"))
    with torch.no_grad():
        for line in lines:
            theirs = eval(line, {"timm": timm}).eval()
            torch.testing.assert_close(theirs(pixels), tuned(pixels), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="is fine-tuned; export it --to timm"):
        export(Export(make().out, "hf", tmp_path / "hf"))
    embed(
        Embed(
            checkpoint=str(make().out), cache=scored.cache.url, shards=make().val,
            out=tmp_path / "features", device="cpu", threads=1,
        )
    )  # fmt: skip
    name = "mean.npy" if pooling == "mean" else "cls.npy"
    features = torch.from_numpy(np.load(tmp_path / "features" / name))
    images = open_images(make(batch_size=10), tuned, "val", RANKS)
    (crops,) = images.crops()
    with torch.no_grad():
        expected = tuned(normalise_images(crops.images))
        torch.testing.assert_close(tuned.head(features), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_same_seed_gives_the_same_weights(make, pooling):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(make(name, seed=seed, pooling=pooling, epochs=1))
    a, b, c = (weights(make(name).out) for name in "abc")
    assert equal(a, b)
    assert not equal(a, c)


def test_a_resumed_run_ends_with_the_same_weights(make):
    def run(name):
        return evaluate(make(name, checkpoint_minutes=0.0, keep_checkpoints=99))

    whole = run("whole")
    run("cut")
    out = make("cut").out
    for path in sorted(out.glob("checkpoint-*.pt"))[7:]:
        path.unlink()  # what is left ends in the middle of the second epoch
    assert run("cut") == whole
    a, b = checkpoint.load(make("whole").out), checkpoint.load(out)
    assert a.step == b.step == 12
    assert equal(a.model, b.model)
    assert equal(a.ema, b.ema)
    assert [line["step"] for line in log_points(out)] == list(range(1, 13))


@pytest.mark.parametrize("number", [2, 3])
def test_a_stop_leaves_a_test_at_once_and_costs_none(make, monkeypatch, capsys, number):
    whole = evaluate(make("whole", epochs=3, head="zero"))
    stopped = make("stopped", epochs=3, head="zero")
    crops, begun, taken = Images.crops, [], []

    def interrupted(images, *arguments, **options):
        begun.append(images)
        for batch in crops(images, *arguments, **options):
            if len(begun) == number:
                os.kill(os.getpid(), signal.SIGTERM)
                taken.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Images, "crops", interrupted)
        assert not evaluate(stopped)
    assert len(taken) == 1  # of three
    assert checkpoint.load(stopped.out).step == 6 * number
    assert ("the last test" in capsys.readouterr().err) == (number == 3)
    assert evaluate(stopped) == whole
    tests = [line["step"] for line in log_events(stopped.out, "evaluation")]
    assert tests == [6, 12, 18]
    assert equal(weights(stopped.out), weights(make("whole").out))


def test_other_options_are_refused_and_another_batch_size_is_elastic(make):
    evaluate(make(epochs=1))
    with pytest.raises(UserError, match=r"mixing\.mixup: 0\.8 -> 0"):
        evaluate(make(epochs=1, mixing=dataclasses.replace(MIXED, mixup=0)))
    with pytest.raises(UserError, match="--elastic"):
        evaluate(make(epochs=1, batch_size=8))
    evaluate(make(epochs=1, batch_size=8, elastic=True))


def test_images_are_read_as_in_pretraining(make):
    options = make(epochs=1, resident=True, crops_per_image=2, interpolation="bilinear")
    evaluate(options)
    assert checkpoint.load(options.out).step == 12  # 24 images, 2 crops of each, 4 at a time


def test_blocks_learn_the_slower_the_nearer_to_the_image(make):
    options = make(optimiser=FinetuneOptimiser(0.05, layer_decay=0.5, warmup_epochs=0))
    encoder = open_encoder(options)
    images = [open_images(options, encoder, name, RANKS) for name in ("train", "val")]
    run = Finetuning(encoder, *images, options)
    run.optimisation.schedule.step_update(0)
    rate = {
        id(parameter): group["lr"]
        for group in run.optimisation.optimizer.param_groups
        for parameter in group["params"]
    }
    peak = 0.05 * 4 / 256
    assert rate[id(run.model.head.weight)] == pytest.approx(peak)
    for n, block in enumerate(run.model.blocks):
        assert rate[id(block.attn.qkv.weight)] == pytest.approx(peak * 0.5 ** (6 - n))
    assert rate[id(run.model.patch_embed.proj.weight)] == pytest.approx(peak * 0.5**7)


def test_short_runs_mix_nothing_unless_they_are_asked_to():
    short, long = Mixing(cutmix=0.5).resolved(4), Mixing(cutmix=0.5).resolved(50)
    assert short == Mixing("", 0.0, 0.5, 0.1, 0.0)
    assert long == Mixing("rand-m9-mstd0.5-inc1", 0.8, 0.5, 0.1, 0.1)


@pytest.mark.parametrize(
    ("given", "epochs", "area"),
    [(None, 49, (0.35, 1)), (None, 50, (0.08, 1)), ((0.08, 1), 4, (0.08, 1))],
)
def test_short_runs_crop_gently_unless_they_are_asked_not_to(make, given, epochs, area):
    view = FinetuneView(given, flip=0.25)
    assert make(view=view, epochs=epochs).loader(32).view == RandomView(area, flip=0.25)


@pytest.mark.parametrize(
    ("given", "epochs", "batch", "rate"),
    [
        (None, 50, 1024, 2e-3),  # MAE's
        (None, 49, 1024, 2e-3),
        (None, 49, 256, 2e-3),
        (None, 49, 64, 5e-4),
        (1e-3, 4, 64, 2.5e-4),
    ],
)
def test_short_runs_take_higher_rates_but_none_above_maes(given, epochs, batch, rate):
    resolved = FinetuneOptimiser(given).resolved(epochs, batch)
    assert resolved.base_learning_rate * batch / 256 == pytest.approx(rate)


def test_mixing_needs_an_even_batch(make):
    with pytest.raises(UserError, match="--batch-size 5 must be even"):
        make(batch_size=5)


def _command(options, out):
    return [
        "-m", "famt.train.evaluate", "finetune", "--checkpoint", options.checkpoint,
        "--cache", options.cache, "--train", *options.train, "--val", *options.val,
        "--out", str(out), "--batch-size", "2", "--epochs", "4", "--log-steps", "1",
        "--checkpoint-minutes", "0", "--device", "cpu", "--threads", "1",
        "--optimiser.ema-decay", "0.5", "--optimiser.base-learning-rate", "0.05",
        "--head", "zero",
    ]  # fmt: skip


@pytest.mark.slow
def test_ranks_leave_a_test_together(make, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def run(number, out):
        program = [program_file("stop_while_testing"), str(number), *_command(make(), out)[1:]]
        finish(launch(*program, machines=["a", "a"]))

    run(99, whole)
    run(2, stopped)
    assert checkpoint.load(stopped).step == 12
    run(99, stopped)
    tests = [line["step"] for line in log_events(stopped, "evaluation")]
    assert tests == [6, 12, 18, 24]
    assert equal(weights(stopped), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_at_random_ends_with_the_same_weights(make, tmp_path, world_size):
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out):
        return [*launcher, *_command(make(), out)]

    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, timeout=300, **quiet)
    kill_at_random(command(out), out, quiet["env"])
    done = subprocess.run(command(out), check=True, timeout=300, capture_output=True,
                          env=quiet["env"], text=True)  # fmt: skip
    assert "9 images to test on" in done.stdout
    a, b = checkpoint.load(whole), checkpoint.load(out)
    assert a.step == b.step == 48 // world_size
    assert equal(a.model, b.model)
    assert equal(a.ema, b.ema)
