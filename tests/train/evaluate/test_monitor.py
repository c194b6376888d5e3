import dataclasses
import os
import signal

import pytest
import torch
from runs import equal, log_events
from samples import photo_members, score, tar_bytes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from pipeline.cache import ScoreCache
from train import checkpoint
from train.config import Pretrain
from train.distributed import Ranks
from train.evaluate.knn import predict
from train.evaluate.monitor import Monitor
from train.evaluate.trunk import Evaluation, open_images, top1
from train.log import Log
from train.pretrain import Run
from train.pretrain import main as pretrain
from train.timing import Clock

RANKS = Ranks(0, 1, "here", torch.device("cpu"))
SIZES = MODELS["vit_nano"]


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path, 0, 10, 8, Clock(RANKS.device), "train")
    yield log
    log.close()


@pytest.fixture
def monitor(scored):
    return Monitor(scored.shards, ScoreCache(scored.cache.url), SIZES, 1, RANKS)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return MaskedAutoencoder(SIZES).encoder


def test_a_look_is_that_of_the_encoder_as_it_was(monitor, encoder, log, options, tmp_path):
    images = open_images(options(Evaluation, val=options(Evaluation).train), encoder, "val", RANKS)
    expected = images.features(encoder.eval())
    encoder.train()
    monitor.look(encoder, 7, log)
    with torch.no_grad():
        for weights in encoder.parameters():
            weights.zero_()
    assert encoder.training
    (line,) = log_events(tmp_path, "evaluation")
    assert (line["step"], line["evaluator"]) == (7, "monitor")
    values = {"knn_cls", "knn_mean", "probe_cls", "probe_mean", "seconds"}
    assert values <= line.keys()
    log.close()
    curves = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert {f"monitor/{name}" for name in values} <= set(curves)
    # The k-NN by hand, on features that an encoder left alone gives.
    assert len(expected.labels) == 17
    known, tested = monitor._known, monitor._tested
    assert len(tested) == 5
    every = monitor._images.features(monitor._encoder)
    torch.testing.assert_close(every.mean[:17], expected.mean, atol=1e-5, rtol=1e-4)
    found = predict(every.mean[known], every.labels[known], every.mean[tested])
    assert line["knn_mean"] == pytest.approx(top1(found, every.labels[tested], 3), abs=1e-5)


def test_nothing_is_drawn_from_the_generator_of_the_training(scored, encoder, log):
    before = torch.get_rng_state()
    monitor = Monitor(scored.shards, ScoreCache(scored.cache.url), SIZES, 1, RANKS)
    monitor.look(encoder, 1, log)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_look_that_fails_is_told_and_training_goes_on(monitor, encoder, log, tmp_path, scored):
    (scored.folder / "train-000001.tar").unlink()
    monitor.look(encoder, 1, log)
    (line,) = log_events(tmp_path, "monitor failed")
    assert line["reason"]


def test_images_without_a_class_are_refused_at_once(scored, tmp_path):
    path = tmp_path / "unlabelled.tar"
    path.write_bytes(tar_bytes([m for m in photo_members(3) if m[0].endswith("jpg")]))
    score([path], scored.cache, scored.spec)
    with pytest.raises(ValueError, match=r"unlabelled\.tar:img0000 and 2 more samples"):
        Monitor([str(path)], scored.cache, SIZES, 1, RANKS)


def test_a_monitored_run_ends_with_the_same_weights_and_tells_more(config, scored, tmp_path):
    watched = dataclasses.replace(
        config, out=tmp_path / "watched", monitor=scored.shards, monitor_epochs=1
    )
    pretrain(config)
    pretrain(watched)
    one, other = (checkpoint.load(each.out) for each in (config, watched))
    assert equal(one.model, other.model)
    assert [line["step"] for line in log_events(watched.out, "evaluation")] == [3, 6, 9]
    pretrain(watched)  # it is over, and needs no look


@pytest.mark.parametrize("killed", [False, True])
def test_neither_a_stop_nor_a_kill_at_the_end_costs_the_last_look(
    scored, tmp_path, monkeypatch, killed
):
    config = Pretrain(
        shards=scored.shards, cache=scored.cache.url, out=tmp_path / "run", model="vit_nano",
        epochs=1, batch_size=8, spec=scored.spec, device="cpu", threads=1, log_steps=1,
        checkpoint_minutes=0.0, monitor=scored.shards,
    )  # fmt: skip
    update = Run.update

    def stopping(run):
        update(run)
        if run.step == run.last_step:
            os.kill(os.getpid(), signal.SIGTERM)

    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if killed:
            patch.setattr(Monitor, "look", dying)
            with pytest.raises(KeyboardInterrupt):
                pretrain(config)
        else:
            patch.setattr(Run, "update", stopping)
            pretrain(config)
    if killed:
        pretrain(config)
    assert [line["step"] for line in log_events(config.out, "evaluation")] == [3]
    assert log_events(config.out, "finished")
