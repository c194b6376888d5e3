import dataclasses
import threading
import time
from pathlib import Path

import pytest
import torch

from famt.geometry import crop_maps
from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from pipeline.generations import Generation
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.manifest import CacheError
from pipeline.refresh import refresh_shards
from pipeline.scores import ModelScoreSpec, encoder_digest
from pipeline.table import load_samples
from train import checkpoint
from train.config import PeriodicConfig, parse
from train.distributed import ranks
from train.log import Log
from train.pretrain import Run, main
from train.refresh import PeriodicAttention, encoder_path, finished_path
from train.streams import Stop
from train.timing import Clock


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config, attention="periodic", periodic=PeriodicConfig(every=2), plain_epochs=1
    )


def _periodic(config, scored, run="run-a"):
    table = load_samples(scored.shards, scored.cache)
    with ranks("cpu") as here:
        return PeriodicAttention(config, run, table, 8, here), table


def _model(seed=0):
    torch.manual_seed(seed)
    return MaskedAutoencoder(MODELS["vit_nano"])


def _refresh(scored, path, kind="famt"):
    """What the job does, in this process."""
    marked = checkpoint.load_encoder(path)
    spec = ModelScoreSpec(kind, 8, 32, encoder_digest(marked.weights))
    done = refresh_shards(
        marked.build(), scored.shards, scored.cache, spec,
        batch_size=8, threads=1, device=torch.device("cpu"),
    )  # fmt: skip
    list(done)
    table = load_samples(scored.shards, scored.cache)
    generation = Generation(marked.run, marked.step, spec, table.digest, len(table))
    scored.cache.generations.publish(generation)
    return generation


def _crops(table):
    config = LoaderConfig(8, image_size=32, shuffle_buffer=8, threads=1)
    return next(iter(CropLoader(table, config, drop_last=True)))


def _until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_a_generation_is_asked_for_read_ahead_and_taken_up_between_epochs(config, scored):
    periodic, table = _periodic(config, scored)
    log = Log(config.out, 0, 9, 8, Clock(torch.device("cpu")))
    crops, encoder = _crops(table), _model().encoder
    periodic.begin_epoch(0, 0, encoder, Stop(), log)
    assert not list(config.out.glob("refresh/*.pt"))  # a plain epoch
    periodic.begin_epoch(1, 3, encoder, Stop(), log)
    marked = encoder_path(config.out, 3)
    assert marked.exists()
    assert periodic.read(crops, 0) is None
    generation = _refresh(scored, marked)
    _until(lambda: periodic._ahead.ready)
    assert periodic.current is None  # not before the epoch's end
    periodic.begin_epoch(2, 6, encoder, Stop(), log)
    assert periodic.current == generation
    assert not marked.exists()
    stored = [
        torch.from_numpy(scored.cache.read_maps([i], generation.spec)[0]) for i in table.shard_ids
    ]
    maps = torch.cat(stored)[crops.rows]
    expected = crop_maps(maps, crops.windows, crops.flips, 8).flatten(1)
    torch.testing.assert_close(periodic.read(crops, 0), expected)
    (event,) = [line for line in _lines(config.out) if '"generation"' in line]
    assert '"generation": 3' in event
    assert '"age_steps": 3' in event
    assert '"coverage": 1.0' in event
    periodic.close(finished=True)
    assert finished_path(config.out).exists()


def _lines(out):
    path = out / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_resumed_run_takes_up_at_each_epoch_what_it_took_up_before(config, scored):
    encoder = _model().encoder
    periodic, _ = _periodic(config, scored)
    periodic.begin_epoch(1, 3, encoder, Stop(), None)
    first = _refresh(scored, encoder_path(config.out, 3))
    periodic.begin_epoch(2, 6, encoder, Stop(), None)  # too early: it is not read yet
    in_time = periodic.current
    _until(lambda: periodic._ahead.ready or periodic.current)
    periodic.begin_epoch(3, 9, _model(1).encoder, Stop(), None)
    assert periodic.current == first
    _refresh(scored, encoder_path(config.out, 9))
    periodic.close(finished=False)

    again, _ = _periodic(config, scored)
    _until(lambda: again._ahead.ready and again._ahead.ready[0].step == 9)
    again.begin_epoch(2, 6, encoder, Stop(), None)
    assert again.current == in_time
    again.begin_epoch(3, 9, encoder, Stop(), None)
    assert again.current == first  # though a newer one is there
    again.begin_epoch(4, 12, encoder, Stop(), None)
    assert again.current.step == 9
    again.close(finished=False)


def test_generations_of_other_runs_shards_or_kinds_are_left_alone(config, scored):
    periodic, _ = _periodic(config, scored)
    periodic.begin_epoch(1, 3, _model().encoder, Stop(), None)
    path = encoder_path(config.out, 3)
    _refresh(scored, path, "attention")
    generation = dataclasses.replace(_refresh(scored, path, "cls_attention"), run="run-b")
    scored.cache.generations.publish(generation)
    scored.cache.generations.publish(
        dataclasses.replace(generation, run="run-a", step=4, data="other shards")
    )
    assert periodic._newest() is None
    periodic.close(finished=False)


def test_a_pinned_generation_serves_another_run_and_stays_while_it_does(config, scored):
    maker, _ = _periodic(config, scored)
    maker.begin_epoch(1, 3, _model().encoder, Stop(), None)
    pinned = _refresh(scored, encoder_path(config.out, 3))
    maker.close(finished=True)
    scored.cache.generations.publish(dataclasses.replace(pinned, step=99))
    config = dataclasses.replace(config, periodic=PeriodicConfig(pin="run-a/3"), plain_epochs=0)
    user, _ = _periodic(config, scored, "run-b")
    user.begin_epoch(0, 0, _model().encoder, Stop(), None)
    assert user.current == pinned
    assert scored.cache.generations.superseded("run-a") == []
    with pytest.raises(CacheError, match="generation run-a/5 of these shards is not in"):
        _periodic(dataclasses.replace(config, periodic=PeriodicConfig(pin="run-a/5")), scored)
    with pytest.raises(ValueError, match="no score of kind 'nonsense'"):
        _periodic(dataclasses.replace(config, periodic=PeriodicConfig(kind="nonsense")), scored)
    with pytest.raises(ValueError, match="must be <run>/<step>"):
        _periodic(dataclasses.replace(config, periodic=PeriodicConfig(pin="7")), scored)


def test_training_goes_on_with_plain_mae_when_nobody_refreshes(config):
    main(config)
    state = checkpoint.load(config.out)
    assert (state.step, state.generation) == (9, None)
    assert finished_path(config.out).exists()
    assert not list(finished_path(config.out).parent.glob("encoder-*.pt"))


def test_a_run_that_waits_for_a_generation_can_be_stopped(config, scored):
    config = dataclasses.replace(config, refresh="wait", epochs=2)
    stop = Stop()

    def ask_while_it_waits():
        _until(lambda: any("refresh due" in line for line in _lines(config.out)))
        stop.asked = True

    threading.Thread(target=ask_while_it_waits).start()
    with ranks("cpu") as here:
        run = Run(config, here)
        run.train(stop)
        if run.periodic._job:
            run.periodic._job.kill()
    state = checkpoint.load(config.out)
    assert (state.step, state.epoch, state.generation) == (3, 1, None)
    assert not finished_path(config.out).exists()


def test_a_cache_that_is_gone_is_reported_and_not_made_anew(config, scored, tmp_path):
    periodic, _ = _periodic(config, scored)
    log = Log(config.out, 0, 9, 8, Clock(torch.device("cpu")))
    periodic.begin_epoch(1, 3, _model().encoder, Stop(), log)
    _refresh(scored, encoder_path(config.out, 3))
    _until(lambda: periodic._ahead.ready)
    Path(scored.cache.url).rename(tmp_path / "elsewhere")
    periodic.begin_epoch(2, 6, _model().encoder, Stop(), log)
    assert periodic.current.step == 3  # it was in RAM
    assert any('"refresh put off"' in line for line in _lines(config.out))
    assert not Path(scored.cache.url).exists()
    periodic.close(finished=False)


def test_damaged_records_are_named(config, scored):
    periodic, _ = _periodic(config, scored)
    periodic.begin_epoch(1, 3, _model().encoder, Stop(), None)
    _refresh(scored, encoder_path(config.out, 3))
    periodic.close(finished=False)
    record = Path(scored.cache.url, "generations", "run-a", "00000003.json")
    record.write_text(record.read_text()[:40])
    with pytest.raises(CacheError, match=r"00000003\.json is damaged .*Remove it"):
        scored.cache.generations.of("run-a")
    (config.out / "generations.json").write_text('{"0": nu')
    with pytest.raises(ValueError, match=r"generations\.json is damaged; remove it"):
        _periodic(config, scored)


def test_a_half_written_encoder_is_refused(config, scored):
    periodic, _ = _periodic(config, scored)
    periodic.begin_epoch(1, 3, _model().encoder, Stop(), None)
    path = encoder_path(config.out, 3)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_encoder(path)
    periodic.close(finished=False)


def test_the_papers_recipes_follow_their_schedules():
    base = ["--shards", "a", "--cache", "c", "--out", "o"]
    paper, amt = (parse(["--recipe", name, *base], None) for name in ("famt-paper", "amt"))
    for config in (paper, amt):
        assert (config.plain_epochs, config.periodic.every, config.attention) == (
            40,
            40,
            "periodic",
        )
        join = config.join
        assert (join.mask_ratio, join.throw_ratio) == (0.45, 0.40)
        assert (join.frequency_exponent, join.attention_exponent) == (0.0, 1.0)
    assert (paper.periodic.kind, amt.periodic.kind) == ("famt", "cls_attention")
