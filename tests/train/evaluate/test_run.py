import dataclasses
import json

import pytest
import torch
from runs import log_events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.train.checkpoint import load_model
from famt.train.evaluate.evaluators.finetune import Finetune, FinetuneOptimiser
from famt.train.evaluate.evaluators.knn import Knn
from famt.train.evaluate.evaluators.segment import Segment
from famt.train.evaluate.run import run
from famt.train.pretrain import main as pretrain


def test_what_was_found_is_printed_logged_and_drawn(trained, options, capsys):
    capsys.readouterr()
    values = run(options(Knn, json=True))
    printed = json.loads(capsys.readouterr().out)
    assert {name: printed[name] for name in values} == pytest.approx(values, rel=1e-5)
    assert printed["evaluate"] == "knn"
    assert (printed["step"], printed["weights"]) == (3, "trained")
    assert (printed["train_images"], printed["val_images"]) == (17, 9)
    (logged,) = log_events(trained.out, "evaluation")
    assert logged["evaluator"] == "knn"
    asked = options(Knn)
    assert logged["options"] == {"train": asked.train, "val": asked.val, "batch_size": 8}
    assert logged["top1_mean"] == pytest.approx(values["top1_mean"], rel=1e-5)
    events = EventAccumulator(str(trained.out)).Reload()
    (drawn,) = events.Scalars("knn/top1_mean")
    assert (drawn.step, drawn.value) == (3, pytest.approx(values["top1_mean"]))


def test_the_untrained_floor_is_told_apart(trained, options):
    untrained = run(options(Knn)) and run(options(Knn, untrained=True))
    evaluations = log_events(trained.out, "evaluation")
    assert [line["weights"] for line in evaluations] == ["trained", "untrained"]
    assert run(options(Knn, untrained=True)) == untrained
    curves = EventAccumulator(str(trained.out)).Reload().Tags()["scalars"]
    assert {"knn/top1_cls", "knn_untrained/top1_cls"} <= set(curves)


def test_an_encoder_that_is_from_no_run_is_evaluated_too(trained, options, tmp_path, capsys):
    of_run = run(options(Knn))
    torch.save(load_model(trained.out).encoder.state_dict(), tmp_path / "elsewhere.pth")
    elsewhere = options(Knn, checkpoint=str(tmp_path / "elsewhere.pth"), json=True)
    assert run(elsewhere) == of_run
    assert "step" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_resumed_run_keeps_what_was_found_of_it(trained, options):
    run(options(Knn, checkpoint=str(trained.out / "checkpoint-00000003.pt")))
    pretrain(trained)
    assert len(log_events(trained.out, "evaluation")) == 1


def test_conditions_are_the_options_that_differ_from_the_defaults_one_by_one(tmp_path):
    shards = {"train": ["train.tar"], "val": ["val.tar"]}
    needed = {"checkpoint": "run", "cache": "scores", **shards}
    assert Segment(**needed).conditions() == shards
    assert Finetune(**needed, out=tmp_path).conditions() == shards
    view = dataclasses.replace(Segment(**needed).view, flip=0.25)
    assert Segment(**needed, view=view, threads=2).conditions() == {**shards, "view.flip": 0.25}
    tuned = Finetune(**needed, out=tmp_path, optimiser=FinetuneOptimiser(layer_decay=0.7))
    assert tuned.conditions() == {**shards, "optimiser.layer_decay": 0.7}
