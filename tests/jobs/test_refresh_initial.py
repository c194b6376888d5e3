"""Maps of a trained encoder before a run has learned anything."""

import json

import pytest
import torch
from launch import run

from famt.jobs.options import RefreshScores
from famt.jobs.refresh_scores import initial_encoder
from famt.models import MODELS, ModelConfig
from famt.pipeline.errors import UserError
from famt.pipeline.scores import encoder_digest
from famt.pipeline.scoring.generation import generations, open_generation


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    encoder = MODELS["vit_nano"].encoder()
    torch.nn.init.normal_(encoder.cls_token)
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_an_encoder_of_no_run_has_a_name_that_its_weights_give(source):
    args = RefreshScores(init=str(source), shards=["x.tar"], cache="scores")
    encoder = initial_encoder(args)
    assert encoder.step == 0
    assert encoder.run == f"init-{encoder_digest(torch.load(source))[:12]}"
    assert ModelConfig(**encoder.sizes).image_size == 32
    larger = initial_encoder(
        RefreshScores(init=str(source), shards=["x.tar"], cache="scores", image_size=56)
    )
    assert ModelConfig(**larger.sizes).grid == 14
    assert larger.run != encoder.run


def test_what_an_initial_encoder_lacks_is_asked_for(source):
    with pytest.raises(UserError, match="--init needs --shards and --cache"):
        initial_encoder(RefreshScores(init=str(source), cache="scores"))


@pytest.mark.slow
def test_a_run_weighs_by_any_encoder_from_its_first_step(scored, source, tmp_path):
    inputs = ["--shards", *scored.shards, "--cache", scored.cache.url, "--init", str(source)]
    done = run(
        "jobs/refresh_scores.py", *inputs, "--workers", "1", "--out", str(tmp_path / "maps"),
        "--json",
    )  # fmt: skip
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["images"] == 26
    (path,) = generations(tmp_path / "maps")
    made = open_generation(path)
    assert made.step == 0
    assert made.specs["token_frequency"]["encoder"] == encoder_digest(torch.load(source))
    trained = run(
        "-m", "famt.train.pretrain", *inputs, "--out", str(tmp_path / "run"), "--model", "vit_nano",
        "--frequency.source", "refreshed", "--attention.source", "off", "--refresh.pin", str(path),
        "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--threads", "1",
    )  # fmt: skip
    assert f"from {path}" in trained.stdout
    assert "starts from" in trained.stdout


def test_a_size_that_does_not_divide_into_patches_is_refused_by_the_source(source):
    args = RefreshScores(init=str(source), shards=["x.tar"], cache="scores", image_size=55)
    with pytest.raises(UserError, match=f"{source}: image_size 55 must be a multiple"):
        initial_encoder(args)
