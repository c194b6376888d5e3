import dataclasses
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from famt.pipeline.collector import Collection, collect, collect_superseded
from runs import log_events, log_points
from samples import photo_members, tar_bytes

from famt.geometry import crop_maps
from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.errors import CacheError
from famt.pipeline.generations import Generation
from famt.pipeline.join import crop_scores
from famt.pipeline.loader import CropLoader, LoaderConfig
from famt.pipeline.refresh import refresh_shards
from famt.pipeline.scores import ModelScoreSpec, encoder_digest
from famt.pipeline.table import load_maps, load_samples
from famt.train import checkpoint
from famt.train.distributed import join_ranks
from famt.train.log import Log
from famt.train.pretrain import Run, main
from famt.train.signals import due, following
from famt.train.signals.config import AttentionConfig, FrequencyConfig, RefreshConfig
from famt.train.signals.due import encoder_path, finished_path, followed, write_failure
from famt.train.signals.following import FollowedMaps, lost_generations
from famt.train.streams import Stop
from famt.train.timing import Clock

KIND = "frequency_attention"


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config,
        frequency=FrequencyConfig("refreshed", kind=KIND),
        attention=AttentionConfig("off"),
        refresh=RefreshConfig(every=2),
        plain_epochs=1,
    )


def _model(seed=0):
    torch.manual_seed(seed)
    return MaskedAutoencoder(MODELS["vit_nano"])


def _followed(config, scored, run="run-a", seed=0):
    table = load_samples(scored.shards, scored.cache)
    with join_ranks("cpu") as ranks:
        return FollowedMaps(run, config, table, scored.cache, _model(seed).encoder, ranks), table


def _remove_maps(scored, table, spec):
    shutil.rmtree(Path(scored.cache.url, "shards", table.shard_ids[1], spec.id))


def _refresh(scored, path, kinds=None, then=lambda spec: None):
    """What the job does, in this process; `then` runs before the generation is published."""
    marked = checkpoint.load_encoder(path)
    digest = encoder_digest(marked.weights)
    specs = [ModelScoreSpec(kind, 8, 32, digest) for kind in kinds or marked.kinds]
    done = refresh_shards(
        marked.build(), marked.urls, scored.cache, specs,
        batch_size=8, threads=1, device=torch.device("cpu"),
    )  # fmt: skip
    list(done)
    then(specs[0])
    table = load_samples(marked.urls, scored.cache)
    generation = Generation(marked.run, marked.step, specs, table.digest, len(table))
    scored.cache.generations.publish(generation)
    return generation


def _crops(table):
    config = LoaderConfig(8, image_size=32, shuffle_buffer=8, threads=1)
    return next(iter(CropLoader(table, config, drop_last=True)))


def _begin(run, epoch, step):
    run.optimisation.step = step
    run.begin_epoch(epoch, Stop())


def _until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_a_generation_is_asked_for_read_ahead_and_taken_up_between_epochs(config, scored):
    followed, table = _followed(config, scored)
    log = Log(config.out, 0, 9, 8, Clock(torch.device("cpu")), "train")
    crops = _crops(table)
    followed.begin_epoch(0, 0, Stop(), log)
    assert not list(config.out.glob("refresh/*.pt"))  # a plain epoch
    followed.begin_epoch(1, 3, Stop(), log)
    marked = encoder_path(config.out, 3)
    assert checkpoint.load_encoder(marked).config["device"] == "cpu"  # not "auto"
    assert followed.read(KIND, crops) is None
    generation = _refresh(scored, marked)
    _until(lambda: followed._ahead.ready)
    assert followed.current is None  # not before the epoch's end
    followed.begin_epoch(2, 6, Stop(), log)
    assert followed.current == generation
    assert not marked.exists()
    stored = [
        torch.from_numpy(scored.cache.read_maps([i], generation.specs[0])[0])
        for i in table.shard_ids
    ]
    maps = torch.cat(stored)[crops.rows]
    expected = crop_maps(maps, crops.windows, crops.flips, 8).flatten(1)
    torch.testing.assert_close(followed.read(KIND, crops), expected)
    (event,) = log_events(config.out, "generation")
    assert (event["generation"], event["age_steps"], event["coverage"]) == (3, 3, 1.0)
    followed.close(finished=True)
    assert finished_path(config.out).exists()


def test_a_generation_whose_maps_are_gone_is_told_of_and_asked_for_again(config, scored):
    followed, table = _followed(config, scored)
    log = Log(config.out, 0, 9, 8, Clock(torch.device("cpu")), "train")
    followed.begin_epoch(1, 3, Stop(), log)
    marked = encoder_path(config.out, 3)
    asked = marked.stat().st_mtime_ns
    generation = _refresh(scored, marked, then=lambda spec: _remove_maps(scored, table, spec))
    _until(lambda: followed._ahead.lost)
    followed.begin_epoch(2, 6, Stop(), log)
    (event,) = log_events(config.out, "generation lost")
    assert event["asked_for_again"]
    assert table.shard_ids[1] in event["reason"]
    assert marked.stat().st_mtime_ns > asked  # which the job's follower sees
    assert followed.current is None
    _refresh(scored, marked)
    _until(lambda: followed._ahead.ready)
    followed.begin_epoch(3, 9, Stop(), log)
    assert followed.current == generation
    followed.close(finished=True)


def test_a_waiting_run_goes_on_only_when_all_maps_are_there(config, scored):
    waiting = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=True))
    with due.followed(config.out):  # or the run would not begin
        followed, table = _followed(waiting, scored)
    followed._leave_encoder(3, None)
    generation = _refresh(scored, encoder_path(config.out, 3))
    assert followed._made(3)
    _remove_maps(scored, table, generation.specs[0])
    assert not followed._made(3)
    asked = encoder_path(config.out, 3).stat().st_mtime_ns
    followed._leave_encoder(3, None)  # as a resumed run does
    assert encoder_path(config.out, 3).stat().st_mtime_ns > asked
    followed.close(finished=True)


def test_a_resumed_run_takes_up_at_each_epoch_what_it_took_up_before(config, scored):
    config = dataclasses.replace(config, epochs=6)
    followed, _ = _followed(config, scored)
    followed.begin_epoch(1, 3, Stop(), None)
    first = _refresh(scored, encoder_path(config.out, 3))
    followed.begin_epoch(2, 6, Stop(), None)  # too early: it is not read yet
    in_time = followed.current
    _until(lambda: followed._ahead.ready or followed.current)
    followed.begin_epoch(3, 9, Stop(), None)
    assert followed.current == first
    _refresh(scored, encoder_path(config.out, 9))
    followed.close(finished=False)

    again, _ = _followed(config, scored)
    _until(lambda: again._ahead.ready and again._ahead.ready[0].step == 9)
    again.begin_epoch(2, 6, Stop(), None)
    assert again.current == in_time
    again.begin_epoch(3, 9, Stop(), None)
    assert again.current == first  # though a newer one is there
    again.begin_epoch(4, 12, Stop(), None)
    assert again.current.step == 9
    again.close(finished=False)


def test_generations_of_other_runs_shards_or_kinds_are_left_alone(config, scored):
    followed, _ = _followed(config, scored)
    followed.begin_epoch(1, 3, Stop(), None)
    path = encoder_path(config.out, 3)
    _refresh(scored, path, ["attention"])
    generation = _refresh(scored, path)
    scored.cache.generations.publish(dataclasses.replace(generation, run="run-b"))
    others = dataclasses.replace(generation, step=4, data="other shards")
    scored.cache.generations.publish(others)
    known = {each.step for each in scored.cache.generations.of("run-a")}
    assert known == {3, 4}
    assert followed._newest() == generation
    followed.close(finished=False)


def test_a_pinned_encoder_of_step_0_that_is_not_there_is_no_matter_of_elastic(config, scored):
    pinned = dataclasses.replace(config, refresh=RefreshConfig(pin="init-a/0"), plain_epochs=0)
    with pytest.raises(CacheError, match=r"generation init-a/0 .* lists those that are$"):
        _followed(pinned, scored)


def test_a_pinned_generation_serves_another_run_and_stays_while_it_does(config, scored):
    maker, _ = _followed(config, scored)
    maker.begin_epoch(1, 3, Stop(), None)
    pinned = _refresh(scored, encoder_path(config.out, 3))
    maker.close(finished=True)
    scored.cache.generations.publish(dataclasses.replace(pinned, step=99))
    config = dataclasses.replace(config, refresh=RefreshConfig(pin="run-a/3"), plain_epochs=0)
    user, _ = _followed(config, scored, "run-b")
    user.begin_epoch(0, 0, Stop(), None)
    assert user.current == pinned
    assert scored.cache.generations.superseded("run-a") == []
    with pytest.raises(CacheError, match=r"generation run-a/5 of these shards, .* is not in"):
        _followed(dataclasses.replace(config, refresh=RefreshConfig(pin="run-a/5")), scored)
    nonsense = dataclasses.replace(config, frequency=FrequencyConfig("refreshed", kind="nonsense"))
    with pytest.raises(ValueError, match="no score of kind 'nonsense'"):
        _followed(nonsense, scored)
    with pytest.raises(ValueError, match="must be <run>/<step>"):
        _followed(dataclasses.replace(config, refresh=RefreshConfig(pin="7")), scored)


def test_training_goes_on_with_plain_mae_when_nobody_refreshes(config):
    main(config)
    state = checkpoint.load(config.out)
    assert (state.step, state.signals) == (9, {"frequency": {"generation": None}})
    assert finished_path(config.out).exists()


def test_a_run_says_once_what_it_goes_on_with(config, capfd):
    main(dataclasses.replace(config, epochs=8, refresh=RefreshConfig(every=3)))
    (said,) = log_events(config.out, "no generation yet")
    assert "--follow" in said["to_make_one"]
    assert capfd.readouterr().err.count("no generation yet") == 1


def test_the_pixel_score_weighs_until_there_is_a_generation(config, scored):
    config = dataclasses.replace(
        config,
        frequency=FrequencyConfig("cached-then-refreshed", kind="token_frequency"),
        plain_epochs=0,
    )
    with join_ranks("cpu") as ranks:
        run = Run(config, ranks)
        (signal,) = run.signals
        crops = next(iter(run.loader))
        pixels = load_maps(run.samples, scored.cache, scored.spec)
        torch.testing.assert_close(signal.read(crops, 0), crop_scores(pixels, crops, 8))
        assert signal.exponent == 0.25
        _begin(run, 2, 6)
        generation = _refresh(scored, encoder_path(config.out, 6))
        _begin(run, 3, 9)
        _until(lambda: signal._followed._ahead.ready)
        _begin(run, 4, 12)
        read = scored.cache.read_maps(run.samples.shard_ids, generation.specs[0])
        maps = torch.cat([torch.from_numpy(each) for each in read])
        torch.testing.assert_close(signal.read(crops, 0), crop_scores(maps, crops, 8))
        assert signal.exponent == 1.0
        run.close(finished=True)


def _ask_when(stop, condition):
    def ask():
        _until(condition)
        stop.asked = True

    threading.Thread(target=ask, daemon=True).start()


def test_a_run_that_waits_for_a_generation_can_be_stopped(config):
    config = dataclasses.replace(
        config, refresh=RefreshConfig(every=2, wait=True), epochs=3, log_steps=4
    )
    stop = Stop()
    _ask_when(stop, lambda: bool(log_events(config.out, "refresh due")))
    with followed(config.out), join_ranks("cpu") as ranks:
        Run(config, ranks).train(stop)
    state = checkpoint.load(config.out)
    assert (state.step, state.epoch) == (3, 1)
    assert state.signals == {"frequency": {"generation": None}}
    # The losses of the first epoch are logged before they are saved.
    assert [(line["step"], line["epoch"]) for line in log_points(config.out)] == [(3, 0)]
    assert not finished_path(config.out).exists()


def test_a_run_that_waits_ends_with_the_reason_when_the_job_fails(config):
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=True), epochs=3)

    def fail():
        _until(encoder_path(config.out, 3).exists)
        write_failure(encoder_path(config.out, 3), "no room on the cluster")

    threading.Thread(target=fail, daemon=True).start()
    reason = "no generation of step 3 was made: no room on the cluster"
    with followed(config.out), pytest.raises(OSError, match=reason):
        main(config)


def test_a_run_that_waits_does_not_begin_where_no_job_follows_it(config, monkeypatch, capfd):
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=True))
    monkeypatch.setattr(following, "_PATIENCE", 0.5)
    with pytest.raises(ValueError, match=r"-m jobs\.pretrain` brings one .*--follow"):
        main(config)
    assert not log_events(config.out, "start")
    assert f"start `famt refresh --follow {config.out}`" in capfd.readouterr().err


def test_a_job_may_come_up_after_the_run_that_needs_it(config, scored, capfd):
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=True))
    job = followed(config.out)

    def come():
        time.sleep(0.5)
        job.__enter__()

    threading.Thread(target=come, daemon=True).start()
    run, _ = _followed(config, scored)
    assert "no job follows" in capfd.readouterr().err
    assert "none does" not in run.describe()
    run.close(finished=False)
    job.__exit__(None, None, None)


def test_a_run_says_at_its_start_what_to_start_beside_it(config, capfd):
    main(config)
    plan = capfd.readouterr().out
    assert f"none does: start `famt refresh --follow {config.out}`" in plan


def test_a_run_says_once_that_the_job_beside_it_ended(config, scored):
    log = Log(config.out, 0, 9, 8, Clock(torch.device("cpu")), "train")
    with followed(config.out):
        run, _ = _followed(config, scored)
        run.begin_epoch(0, 0, Stop(), log)
        assert not log_events(config.out, "refresh job ended")
    run.begin_epoch(1, 3, Stop(), log)
    run.begin_epoch(2, 6, Stop(), log)
    (event,) = log_events(config.out, "refresh job ended")
    assert event["step"] == 3
    assert str(config.out) in event["to_start_one"]
    run.close(finished=False)


def test_a_run_that_waits_does_not_wait_for_an_encoder_that_could_not_be_written(
    config, monkeypatch
):
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=True), epochs=3)

    def full(path, encoder):
        raise OSError(f"{path}: no space left")

    monkeypatch.setattr(checkpoint, "save_encoder", full)
    with followed(config.out), pytest.raises(OSError, match="no space left"):
        main(config)


def test_a_run_begun_anew_forgets_what_an_attempt_without_checkpoint_left(config, scored):
    config = dataclasses.replace(config, epochs=6)
    first, _ = _followed(config, scored, "run-dead")
    first.begin_epoch(1, 3, Stop(), None)
    _refresh(scored, encoder_path(config.out, 3))
    _until(lambda: first._ahead.ready)
    first.begin_epoch(2, 6, Stop(), None)
    first.begin_epoch(3, 9, Stop(), None)
    assert encoder_path(config.out, 9).exists()
    first.close(finished=False)  # killed: no checkpoint was written
    again, _ = _followed(config, scored, "run-new", seed=1)
    assert not encoder_path(config.out, 9).exists()
    again.begin_epoch(1, 3, Stop(), None)
    again.begin_epoch(2, 6, Stop(), None)
    assert again.current is None
    generation = _refresh(scored, encoder_path(config.out, 3))
    assert generation.run == "run-new"
    again.close(finished=False)


def test_a_resumed_run_keeps_the_generations_that_it_may_have_to_repeat(config, scored):
    config = dataclasses.replace(config, epochs=6)
    followed, _ = _followed(config, scored)
    for epoch, step in ((1, 3), (2, 6), (3, 9), (4, 12)):
        followed.begin_epoch(epoch, step, Stop(), None)
        if epoch % 2:
            generation = _refresh(scored, encoder_path(config.out, step))
            _until(lambda: followed._ahead.ready)
    assert followed.current == generation
    (config.out / "checkpoint-00000007.pt").touch()  # of epoch 2, which began with generation 3
    followed.close(finished=False)
    again, _ = _followed(config, scored)
    collect_superseded(scored.cache, "run-a", again._samples.shard_ids)
    again.restore(3)
    again.begin_epoch(4, 12, Stop(), None)
    assert again.current.step == 9
    again.close(finished=False)


def test_a_run_whose_generations_are_gone_goes_on_only_if_elastic(config, scored):
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2, wait=True), epochs=4)
    stop = Stop()
    first, second = (encoder_path(config.out, step) for step in (3, 9))

    def refresh_once_and_stop():
        _until(first.exists)
        _refresh(scored, first)
        _until(second.exists)
        stop.asked = True

    threading.Thread(target=refresh_once_and_stop, daemon=True).start()
    with due.followed(config.out), join_ranks("cpu") as ranks:
        Run(config, ranks).train(stop)
    left = checkpoint.load(config.out)
    assert (left.step, left.signals) == (9, {"frequency": {"generation": 3}})

    list(collect(scored.cache, Collection(drop_runs=(left.run,))))
    config = dataclasses.replace(config, refresh=RefreshConfig(every=2))
    with pytest.raises(ValueError, match=rf"without generation {left.run}/3 .*--elastic goes on"):
        main(config)
    main(dataclasses.replace(config, elastic=True))
    assert checkpoint.load(config.out).step == 12


def test_generations_of_epochs_after_a_checkpoint_are_needed_to_repeat_them(config, scored):
    followed, table = _followed(config, scored)
    for epoch, step in ((1, 3), (2, 6), (3, 9)):
        followed.begin_epoch(epoch, step, Stop(), None)
        if epoch == 1:
            _refresh(scored, encoder_path(config.out, step))
            _until(lambda: followed._ahead.ready)
    followed.close(finished=False)
    state = SimpleNamespace(run="run-a", step=3, signals={"frequency": {"generation": None}})
    assert lost_generations(state, config, table, scored.cache) == []
    list(collect(scored.cache, Collection(drop_runs=("run-a",))))
    (lost,) = lost_generations(state, config, table, scored.cache)
    assert lost.startswith("generation run-a/3 ")


def test_an_elastic_restart_begins_with_the_newest_generation(config, scored):
    followed, _ = _followed(config, scored)
    followed.begin_epoch(1, 3, Stop(), None)
    generation = _refresh(scored, encoder_path(config.out, 3))
    followed.close(finished=False)
    again, _ = _followed(config, scored)
    again.restart(2)
    assert again.current == generation
    again.close(finished=False)


def test_one_pass_of_the_encoder_makes_the_maps_of_all_signals(config, scored):
    config = dataclasses.replace(
        config,
        frequency=FrequencyConfig("refreshed", kind="token_frequency"),
        attention=AttentionConfig("refreshed"),
    )
    with join_ranks("cpu") as ranks:
        run = Run(config, ranks)
        crops = next(iter(run.loader))
        _begin(run, 1, 3)
        generation = _refresh(scored, encoder_path(config.out, 3))
        assert [each.kind for each in generation.specs] == ["token_frequency", "attention"]
        _until(lambda: run.context.followed._ahead.ready)
        _begin(run, 2, 6)
        for signal, spec in zip(run.signals, generation.specs, strict=True):
            maps = scored.cache.read_maps(run.samples.shard_ids, spec)
            expected = crop_scores(torch.cat([torch.from_numpy(m) for m in maps]), crops, 8)
            torch.testing.assert_close(signal.read(crops, 0), expected)
        run.close(finished=True)


def test_the_encoder_names_its_runs_own_tars(config, scored):
    config = dataclasses.replace(config, shards=[str(scored.folder)])
    followed, table = _followed(config, scored)
    (scored.folder / "added.tar").write_bytes(tar_bytes(photo_members(2, 90)))
    followed.begin_epoch(1, 3, Stop(), None)
    assert checkpoint.load_encoder(encoder_path(config.out, 3)).urls == table.urls
    assert _refresh(scored, encoder_path(config.out, 3)).data == table.digest
    followed.close(finished=False)


def test_a_cache_that_is_gone_is_reported_and_not_made_anew(config, scored, tmp_path):
    followed, _ = _followed(config, scored)
    log = Log(config.out, 0, 9, 8, Clock(torch.device("cpu")), "train")
    followed.begin_epoch(1, 3, Stop(), log)
    _refresh(scored, encoder_path(config.out, 3))
    _until(lambda: followed._ahead.ready)
    Path(scored.cache.url).rename(tmp_path / "elsewhere")
    followed.begin_epoch(2, 6, Stop(), log)
    assert followed.current.step == 3  # it was in RAM
    assert log_events(config.out, "refresh put off")
    assert not Path(scored.cache.url).exists()
    followed.close(finished=False)


def test_damaged_records_are_named(config, scored):
    followed, _ = _followed(config, scored)
    followed.begin_epoch(1, 3, Stop(), None)
    _refresh(scored, encoder_path(config.out, 3))
    followed.close(finished=False)
    record = Path(scored.cache.url, "generations", "run-a", "00000003.json")
    record.write_text(record.read_text()[:40])
    with pytest.raises(CacheError, match=r"00000003\.json is damaged .*Remove it"):
        scored.cache.generations.of("run-a")
    (config.out / "generations.json").write_text('{"0": nu')
    with pytest.raises(ValueError, match=r"generations\.json is damaged; remove it"):
        _followed(config, scored)


def test_a_half_written_encoder_is_refused(config, scored):
    followed, _ = _followed(config, scored)
    followed.begin_epoch(1, 3, Stop(), None)
    path = encoder_path(config.out, 3)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_encoder(path)
    followed.close(finished=False)
