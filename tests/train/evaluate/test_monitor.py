import dataclasses
import os
import signal
from itertools import product

import pytest
import torch
from runs import equal, log_events, log_points, weights
from samples import RANKS, photo_members, score, tar_bytes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.pipeline.errors import UserError
from famt.train import checkpoint
from famt.train.evaluate.evaluation import Evaluation
from famt.train.evaluate.features import Images, open_images, top1
from famt.train.evaluate.monitor import Monitor
from famt.train.evaluate.neighbours import predict
from famt.train.log import Log
from famt.train.pretrain import main as pretrain
from famt.train.stop import Stop
from famt.train.timing import Clock


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path, 0, 10, 8, Clock(RANKS.device), "train")
    yield log
    log.close()


@pytest.fixture
def watched(config, scored):
    """Options of a run that is monitored after each epoch."""
    return dataclasses.replace(config, monitor=scored.shards, monitor_epochs=1)


@pytest.fixture
def monitor(watched, scored):
    return Monitor(watched, scored.cache, RANKS)


def test_a_look_is_that_of_the_encoder_as_it_was(monitor, encoder, log, options, tmp_path, capsys):
    images = open_images(options(Evaluation, val=options(Evaluation).train), encoder, "val", RANKS)
    expected = images.features(encoder.eval())
    encoder.train()
    assert monitor.look(encoder, 7, log, Stop())
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
    assert line["knn_mean"] == pytest.approx(top1(found, every.labels[tested]), abs=1e-5)
    told = capsys.readouterr().err
    assert f"tested on 5 and learned from {len(known)} images of " in told
    assert " classes (chance: " in told
    assert f" / {100 * line['knn_mean']:.1f} % ± " in told


def test_nothing_is_drawn_from_the_generator_of_the_training(watched, scored, encoder, log):
    before = torch.get_rng_state()
    assert Monitor(watched, scored.cache, RANKS).look(encoder, 1, log, Stop())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_look_that_fails_is_told_and_training_goes_on(monitor, encoder, log, tmp_path, scored):
    (scored.folder / "train-000001.tar").unlink()
    assert monitor.look(encoder, 1, log, Stop())
    (line,) = log_events(tmp_path, "monitor failed")
    assert line["reason"]


def test_images_without_a_class_are_refused_at_once(config, scored, tmp_path):
    path = tmp_path / "unlabelled.tar"
    path.write_bytes(tar_bytes([m for m in photo_members(3) if m[0].endswith("jpg")]))
    score([path], scored.cache, scored.spec)
    with pytest.raises(UserError, match=r"unlabelled\.tar:img0000 and 2 more samples"):
        Monitor(dataclasses.replace(config, monitor=[str(path)]), scored.cache, RANKS)


def test_a_monitored_run_ends_with_the_same_weights_and_tells_more(train, watched, tmp_path):
    alone = train(out=tmp_path / "alone")
    pretrain(watched)
    assert equal(weights(alone), weights(watched.out))
    assert [line["step"] for line in log_events(watched.out, "evaluation")] == [3, 6, 9]
    pretrain(watched)  # it is over, and needs no look


@pytest.mark.parametrize(
    ("step", "asked"),
    [*product([3, 6, 9], ["in features", ""]), (6, "in k-NN")],
)
def test_neither_a_stop_nor_a_kill_costs_a_look(watched, tmp_path, monkeypatch, step, asked):
    config = dataclasses.replace(watched, log_steps=2, checkpoint_minutes=0.0)
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    pretrain(whole)
    crops, looks, batches, searches = Images.crops, [], [], []

    def crops_of_a_look(images, **options):
        looks.append(images)
        for batch in crops(dataclasses.replace(images, batch_size=4), **options):
            if len(looks) == step // 3:
                if not asked:
                    raise KeyboardInterrupt
                if asked == "in features":
                    os.kill(os.getpid(), signal.SIGTERM)
                batches.append(batch)
            yield batch

    def search(*arguments):
        if len(looks) == step // 3:
            os.kill(os.getpid(), signal.SIGTERM)
            searches.append(arguments)
        return predict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Images, "crops", crops_of_a_look)
        patch.setattr("famt.train.evaluate.monitor.predict", search)
        if asked:
            pretrain(config)
            assert log_events(config.out, "stopped by a signal")
            # The first of seven batches, or of two searches.
            assert len(batches if asked == "in features" else searches) == 1
            assert checkpoint.load(config.out).step == step
            assert log_points(config.out)[-1]["step"] == step  # no loss is saved unseen
        else:
            with pytest.raises(KeyboardInterrupt):
                pretrain(config)
    looks = [line["step"] for line in log_events(config.out, "evaluation")]
    assert looks == [each for each in (3, 6, 9) if each < step]
    pretrain(config)
    pretrain(config)  # it is over, and looks no more
    assert [line["step"] for line in log_events(config.out, "evaluation")] == [3, 6, 9]
    assert log_events(config.out, "finished")
    assert equal(weights(config.out), weights(whole.out))
