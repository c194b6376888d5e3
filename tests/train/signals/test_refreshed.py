import dataclasses
import itertools
import shutil
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from launch import until
from runs import log_events, log_points
from samples import RANKS, photo_members, tar_bytes

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropLoader, LoaderConfig
from famt.pipeline.loading.masking import crop_scores
from famt.pipeline.scores import ModelScoreSpec, encoder_digest
from famt.pipeline.scoring.generation import (
    GenerationError,
    generations,
    open_generation,
    write_generation,
)
from famt.pipeline.scoring.model_scores import score_images
from famt.train import checkpoint
from famt.train.log import Log
from famt.train.signals import refreshed_maps
from famt.train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig
from famt.train.signals.refresh_folder import RefreshFolder, load_encoder
from famt.train.signals.refreshed_maps import RefreshedMaps
from famt.train.stop import Stop
from famt.train.timing import Clock

KIND = "frequency_attention"
WAITING = RefreshConfig(every=2, wait=True)


@pytest.fixture
def config(config):
    """Six epochs of three steps; generations are due at epochs 1, 3 and 5."""
    return dataclasses.replace(
        config,
        frequency=FrequencyConfig("refreshed", kind=KIND),
        attention=AttentionConfig("off"),
        refresh=RefreshConfig(every=2),
        plain_epochs=1,
        epochs=6,
    )


@pytest.fixture
def folder(config):
    return RefreshFolder(config.out)


@pytest.fixture
def log(config):
    return Log(config.out, 0, 9, 8, Clock(torch.device("cpu")), "train")


@pytest.fixture
def refresh(scored, folder, tmp_path):
    """What the job does, in this process: makes the generation of a step; returns its path."""

    def refresh(step, run=None, damaged=False):
        left = load_encoder(folder.encoder(step))
        samples, digest = load_samples(left.urls, scored.cache), encoder_digest(left.weights)
        specs = [ModelScoreSpec(kind, 8, 32, digest) for kind in left.kinds]
        cpu = torch.device("cpu")
        maps = score_images(left.build(), samples, specs, batch_size=8, threads=1, device=cpu)
        path = folder.generation(step)
        made = tmp_path / path.name if damaged else path
        write_generation(made, run or left.run, samples.digest, maps)
        if damaged:
            _damage(made)
            made.rename(path)
        return path

    return refresh


def _maps(config, scored, run="run-a"):
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
    samples = load_samples(scored.shards, scored.cache)
    return RefreshedMaps(run, config, samples, encoder, RANKS)


def _begin(maps, *epochs, log=None):
    """Begin epochs; returns the generation in use in each."""
    in_use = []
    for epoch in epochs:
        assert maps.begin_epoch(epoch, 3 * epoch, Stop(), log)
        in_use.append(maps.current)
    return in_use


def _crops(samples):
    config = LoaderConfig(8, image_size=32, shuffle_buffer=8, threads=1)
    return next(iter(CropLoader(samples, config, drop_last=True)))


def _steps(folder):
    return [int(path.stem[-8:]) for path in generations(folder.path)]


def _damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _meanwhile(work):
    threading.Thread(target=work, daemon=True).start()


def test_a_generation_is_asked_for_and_taken_up_when_the_next_epoch_begins(
    config, scored, folder, log, refresh
):
    maps = _maps(config, scored)
    samples = load_samples(scored.shards, scored.cache)
    crops = _crops(samples)
    _begin(maps, 0, log=log)
    assert folder.encoders() == []  # a plain epoch
    _begin(maps, 1, log=log)
    assert load_encoder(folder.encoder(3)).config["device"] == "cpu"  # not "auto"
    generation = open_generation(refresh(3))
    assert maps.read(KIND, crops) is None  # not before the epoch's end
    assert _begin(maps, 2, log=log) == [3]
    assert folder.encoders() == []
    expected = crop_scores(generation.maps(samples, [KIND], 8)[KIND], crops, 8)
    torch.testing.assert_close(maps.read(KIND, crops), expected)
    (event,) = log_events(config.out, "generation")
    assert (event["generation"], event["age_steps"]) == (3, 3)
    maps.close(finished=True)
    assert folder.finished.exists()


def test_a_resumed_run_takes_up_at_each_epoch_what_it_took_up_before(
    config, scored, folder, refresh
):
    maps = _maps(config, scored)
    assert _begin(maps, 1, 2) == [None, None]  # too early: it is not made yet
    refresh(3)
    assert _begin(maps, 3) == [3]
    refresh(9)
    again = _maps(config, scored)
    assert _begin(again, 2, 3, 4) == [None, 3, 9]  # though newer ones were there


def test_generations_stay_until_no_checkpoint_would_take_them_up_again(
    config, scored, folder, refresh
):
    maps = _maps(config, scored)
    of_epoch_2 = config.out / "checkpoint-00000007.pt"
    of_epoch_2.touch()
    for epoch in range(1, 5):
        _begin(maps, epoch)
        if epoch % 2:
            refresh(3 * epoch)
    assert _steps(folder) == [3, 9]
    again = _maps(config, scored)
    again.restore(3)
    assert _begin(again, 3, 4) == [3, 9]
    of_epoch_2.rename(config.out / "checkpoint-00000013.pt")
    again.saved()
    assert _steps(folder) == [9]


@pytest.mark.parametrize("fault", [{"damaged": True}, {"run": "run-dead"}])
@pytest.mark.parametrize("waits", [False, True])
def test_what_cannot_be_used_is_told_of_removed_and_made_again(
    config, scored, folder, log, refresh, fault, waits
):
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=waits))
    with folder.followed():
        maps = _maps(config, scored)

        def work():
            until(folder.encoder(3).exists)
            refresh(3, **fault)
            until(lambda: folder.due() == 3)  # the job sees that it is wanted again
            refresh(3)

        _meanwhile(work)
        _begin(maps, 1, log=log)
        epochs = itertools.count(2, 2)  # at the others another one is due
        until(lambda: _begin(maps, next(epochs), log=log) == [3])
    assert [each["generation"] for each in log_events(config.out, "generation")] == [3]
    (event,) = log_events(config.out, "generation removed")
    assert "generation-00000003.zip is" in event["reason"]


def test_a_pinned_generation_serves_another_run(config, scored, refresh, tmp_path):
    _begin(_maps(config, scored), 1)
    path = Path(shutil.copy(refresh(3), tmp_path))
    pinned = dataclasses.replace(config, refresh=RefreshConfig(pin=path), plain_epochs=0)
    maps = _maps(pinned, scored, "run-b")
    assert _begin(maps, 0, 1) == [3, 3]
    maps.restore(3)
    maps.restart(1)
    assert f"from {path}" in maps.describe()
    others = dataclasses.replace(pinned, frequency=FrequencyConfig("refreshed", kind="attention"))
    with pytest.raises(GenerationError, match="has no scores of kind attention"):
        _maps(others, scored)
    nonsense = dataclasses.replace(config, frequency=FrequencyConfig("refreshed", kind="nonsense"))
    with pytest.raises(UserError, match="no score of kind 'nonsense'"):
        _maps(nonsense, scored)


def test_training_goes_on_with_plain_mae_when_nobody_refreshes(config, train, folder, capfd):
    state = checkpoint.load(train(epochs=3))
    assert (state.step, state.components["frequency"]) == (9, {"generation": None})
    assert folder.finished.exists()
    plan, told = capfd.readouterr()
    assert f"none does: start `famt refresh --follow {config.out}`" in plan
    assert "new score maps used: 0 of 1; no job followed the run" in told


@pytest.mark.parametrize(
    ("used", "told"), [((), "0 of 3; none was ready in"), ((3, 9), "2 of 3\n")]
)
def test_a_finished_run_tells_once_how_many_generations_it_used(
    config, scored, folder, used, told, capsys
):
    with folder.followed():
        maps = _maps(config, scored)
        for epoch, generation in enumerate((None, *used)):
            maps._epochs.write(epoch, 3 * epoch, generation)
        maps._begun = 3
        maps.close(finished=True)
        maps.close(finished=True)  # by the run's other signal
    errors = capsys.readouterr().err
    assert errors.count("new score maps used: ") == 1
    assert told in errors


def test_the_pixel_score_weighs_until_there_is_a_generation(begin, scored, refresh):
    run = begin(
        frequency=FrequencyConfig("cached-then-refreshed", kind=KIND),
        attention=AttentionConfig("refreshed"),
        plain_epochs=0,
    )
    frequency, attention = run.signals
    crops = next(iter(run.loader))
    pixels = load_maps(run.samples, scored.cache, scored.spec)
    torch.testing.assert_close(frequency.read(crops, 0), crop_scores(pixels, crops, 8))
    assert frequency.exponent == 0.25
    assert attention.read(crops, 0) is None
    run.optimisation.step = 6
    run.begin_epoch(2, Stop())
    made = open_generation(refresh(6))  # one pass of the encoder makes the maps of both
    run.begin_epoch(3, Stop())
    for signal in run.signals:
        maps = made.maps(run.samples, [signal._kind], 8)[signal._kind]
        torch.testing.assert_close(signal.read(crops, 0), crop_scores(maps, crops, 8))
    assert frequency.exponent == 1.0


def test_a_run_that_waits_for_a_generation_can_be_stopped(config, begin, folder):
    stop = Stop()

    def ask():
        until(lambda: bool(log_events(config.out, "refresh due")))
        stop.asked = True

    _meanwhile(ask)
    with folder.followed():
        begin(refresh=WAITING, epochs=3, log_steps=4).train(stop)
    state = checkpoint.load(config.out)
    assert (state.step, state.epoch) == (3, 1)
    assert state.components["frequency"] == {"generation": None}
    # The losses of the first epoch are logged before they are saved.
    assert [(line["step"], line["epoch"]) for line in log_points(config.out)] == [(3, 0)]
    assert not folder.finished.exists()


def test_a_run_that_waits_ends_with_the_reason_when_the_job_fails(train, folder):
    def fail():
        until(folder.encoder(3).exists)
        folder.failure(3).write_text("no room on the cluster\n")

    _meanwhile(fail)
    reason = "the generation of step 3 could not be made: no room on the cluster"
    with folder.followed(), pytest.raises(OSError, match=reason):
        train(refresh=WAITING)


def test_a_run_that_does_not_wait_says_why_the_job_failed_and_goes_on(config, scored, folder, log):
    maps = _maps(config, scored)
    _begin(maps, 1, log=log)
    folder.failure(3).write_text("no room on the cluster\n")
    _begin(maps, 2, 3, log=log)
    (event,) = log_events(config.out, "refresh failed")
    assert event["reason"] == "no room on the cluster"


def test_a_run_tells_of_each_refresh_and_from_the_second_on_that_none_is_ready(
    config, scored, log, refresh, capsys
):
    maps = _maps(config, scored)
    _begin(maps, 1, 2, 3, log=log)
    refresh(9)
    _begin(maps, 4, 5, log=log)
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")] == [
        "step 3: new score maps requested, 1 of 3",
        "step 9: new score maps requested, 2 of 3; none is ready so far "
        "(--refresh.wait waits for each)",
        "step 12: new score maps in use, by the encoder of step 9",
        "step 15: new score maps requested, 3 of 3",
    ]


def test_a_run_that_waits_does_not_begin_where_no_job_follows_it(config, train, monkeypatch, capfd):
    monkeypatch.setattr(refreshed_maps, "_PATIENCE", 0.5)
    with pytest.raises(UserError, match=r"`famt pretrain` starts one; .*--follow"):
        train(refresh=WAITING)
    assert not log_events(config.out, "start")
    assert f"start `famt refresh --follow {config.out}`" in capfd.readouterr().err


def test_a_job_may_come_up_after_the_run_that_needs_it(config, scored, folder, capfd, monkeypatch):
    job = folder.followed()
    clock = Mock(monotonic=time.monotonic, sleep=lambda _: job.__enter__())
    monkeypatch.setattr(refreshed_maps, "time", clock)
    maps = _maps(dataclasses.replace(config, refresh=WAITING), scored)
    assert "waiting for a refresh job" in capfd.readouterr().err
    assert "none does" not in maps.describe()
    job.__exit__(None, None, None)


def test_a_run_says_once_that_the_job_beside_it_ended(config, scored, folder, log):
    with folder.followed():
        maps = _maps(config, scored)
        _begin(maps, 0, log=log)
        assert not log_events(config.out, "refresh job ended")
    _begin(maps, 1, 2, log=log)
    (event,) = log_events(config.out, "refresh job ended")
    assert event["step"] == 3
    assert str(config.out) in event["start"]


def test_a_run_begun_anew_forgets_what_an_attempt_without_checkpoint_left(
    config, scored, folder, refresh
):
    first = _maps(config, scored, "run-dead")
    _begin(first, 1)
    refresh(3)
    _begin(first, 2, 3)
    assert (folder.encoders(), _steps(folder)) == ([9], [3])
    again = _maps(config, scored, "run-new")
    assert (folder.encoders(), _steps(folder)) == ([], [])
    assert _begin(again, 1, 2) == [None, None]
    assert open_generation(refresh(3)).run == "run-new"


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), _damage])
def test_a_run_whose_generations_are_lost_goes_on_only_if_elastic(
    config, begin, train, folder, refresh, lose
):
    stop = Stop()

    def refresh_once_and_stop():
        until(folder.encoder(3).exists)
        refresh(3)
        until(folder.encoder(9).exists)
        stop.asked = True

    _meanwhile(refresh_once_and_stop)
    with folder.followed():
        begin(refresh=WAITING, epochs=4).train(stop)
    left = checkpoint.load(config.out)
    assert (left.step, left.components["frequency"]) == (9, {"generation": 3})

    lose(folder.generation(3))
    with pytest.raises(UserError, match=r"without .*generation-00000003\.zip; --elastic resumes"):
        train(epochs=4)
    train(epochs=4, elastic=True)
    assert checkpoint.load(config.out).step == 12
    assert _steps(folder) == []


def test_an_elastic_restart_begins_with_the_newest_generation_that_is_whole(
    config, scored, folder, refresh
):
    maps = _maps(config, scored)
    for epoch in (1, 3):
        _begin(maps, epoch)
        refresh(3 * epoch)
    _damage(folder.generation(9))
    again = _maps(config, scored)
    again.restart(2)
    assert _begin(again, 2) == [3]


def test_the_encoder_names_its_runs_own_tars(config, scored, folder):
    maps = _maps(dataclasses.replace(config, shards=[str(scored.folder)]), scored)
    (scored.folder / "added.tar").write_bytes(tar_bytes(photo_members(2, 90)))
    _begin(maps, 1)
    assert load_encoder(folder.encoder(3)).urls == scored.shards
