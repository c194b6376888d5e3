import dataclasses
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from cache_layouts import PIXELS, make, maps, model_spec, table
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.pipeline.cache import ScoreCache
from famt.pipeline.collector import Collection, collect, collect_superseded
from famt.pipeline.errors import CacheError
from famt.pipeline.generations import Generation
from famt.pipeline.manifest import ShardRecord
from famt.pipeline.packs import sound_packs, write_pack
from famt.pipeline.sealed import seal
from famt.pipeline.storage import Version

NOW = Collection(older_than=timedelta(0))
DATA = (100, 101)  # shards of the two runs
SEED = int(os.environ.get("FAMT_SEED", "0"))
SEEDS = range(2 * SEED, 2 * SEED + 2)


@pytest.fixture
def cache(tmp_path):
    return ScoreCache(str(tmp_path / "cache"), create=True)


def _id(number):
    return f"{number:032x}"


def _record(number):
    return ShardRecord(Version(number, ""), _id(number))


def _files(root):
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in Path(root).rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _collect_from(layout):
    """Run a collection over a layout and hold it against what must be true of any."""
    before = _files(layout.cache.url)
    dry = [each.what for each in collect(layout.cache, Collection(dry_run=True))]
    assert _files(layout.cache.url) == before
    removed = [each.what for each in collect(layout.cache, Collection())]
    assert sorted(removed) == sorted(dry)
    after = _files(layout.cache.url)
    changed = {path for path in before if after.get(path) != before[path]}
    assert not changed & layout.foreign
    assert not changed & layout.keep
    # A manifest clears its own old versions away, and a superseded generation has no age.
    old = {path for path in changed if path.parts[-3] not in ("datasets", "generations")}
    assert not old & layout.young
    for folder, names in layout.records.items():
        assert set(layout.cache.manifests.read(folder)) == names
    assert list(collect(layout.cache, Collection())) == []


@settings(max_examples=8)
@given(st.integers(0, 2**32))
def test_nothing_needed_is_lost_and_nothing_foreign_is_touched(seed):
    with tempfile.TemporaryDirectory() as root:
        _collect_from(make(Path(root), seed))


@pytest.mark.slow
@settings(max_examples=300)
@given(st.integers(0, 2**64))
def test_nothing_needed_is_lost_in_any_of_many_layouts(seed):
    with tempfile.TemporaryDirectory() as root:
        _collect_from(make(Path(root), seed))


def test_maps_that_two_runs_share_stay_until_neither_needs_them(cache):
    """Two runs of equal seed: their first encoders are the same, so is the id of their maps."""
    cache.write(_id(1), table(), model_spec(0), maps())
    for run in ("a", "b"):
        cache.generations.publish(Generation(run, 0, [model_spec(0)], "d", 2))
    cache.write(_id(1), table(), model_spec(1), maps())
    cache.generations.publish(Generation("a", 9, [model_spec(1)], "d", 2))
    assert collect_superseded(cache, "a", [_id(1)]) == []
    assert [each.step for each in cache.generations.of("a")] == [9]
    assert cache.has_entry(_id(1), model_spec(0))
    cache.generations.publish(Generation("b", 9, [model_spec(1)], "d", 2))
    cache.generations.need("b", [0], by="b")
    assert collect_superseded(cache, "b", [_id(1)]) == []
    cache.generations.need("b", [9], by="b")
    (removed,) = collect_superseded(cache, "b", [_id(1)])
    assert removed.what == f"{_id(1)}/{model_spec(0).id}"
    assert not cache.has_entry(_id(1), model_spec(0))
    assert cache.has_entry(_id(1), model_spec(1))


def test_a_dropped_run_leaves_what_another_needs(cache):
    for number, step in enumerate((0, 5, 9)):
        cache.write(_id(1), table(), model_spec(number), maps())
        cache.generations.publish(Generation("a", step, [model_spec(number)], "d", 2))
    cache.manifests.publish({"/nowhere/1.tar": _record(1)})
    cache.generations.need("a", [9], by="a")
    cache.generations.need("a", [5], by="b")
    drop = Collection(older_than=timedelta(0), drop_runs=("a",))
    list(collect(cache, drop))
    assert [each.step for each in cache.generations.of("a")] == [5]
    assert [m.spec_id for m in cache.entry(_id(1)).maps] == [model_spec(1).id]
    list(collect(cache, Collection(older_than=timedelta(0), drop_runs=("a", "b"))))
    assert cache.generations.runs() == []


@pytest.mark.parametrize("name", ["datasets/*/*.json", "generations/*/*.json", "*/*/needed-by-*"])
def test_nothing_goes_while_what_names_it_is_damaged(cache, name):
    cache.write(_id(1), table(), model_spec(0), maps())
    cache.manifests.publish({"/nowhere/1.tar": _record(1)})
    cache.generations.publish(Generation("a", 0, [model_spec(0)], "d", 2))
    cache.generations.need("a", [0], by="a")
    (path,) = Path(cache.url).glob(name)
    path.write_bytes(path.read_bytes()[:-9])
    before = _files(cache.url)
    with pytest.raises(CacheError, match="is damaged"):
        list(collect(cache, NOW))
    assert _files(cache.url) == before


def test_what_a_writer_claims_stays_though_nothing_names_it_yet(cache):
    """A precompute finds an older job's entry; gc comes before it could publish the record."""
    cache.write(_id(1), table(), PIXELS, maps())
    claim = cache.claims.claim(shards=[_id(1)])
    assert cache.has_entry(_id(1), PIXELS)  # the writer has nothing to do
    assert list(collect(cache, NOW)) == []
    cache.manifests.publish({"/nowhere/1.tar": _record(1)})
    cache.claims.release([claim])
    assert list(collect(cache, NOW)) == []
    assert cache.has_entry(_id(1), PIXELS)


def test_maps_of_a_spec_that_is_claimed_stay_in_all_entries(cache):
    """A refresh finds maps that a killed one left, and another run's collection comes by."""
    cache.write(_id(1), table(), model_spec(0), maps())
    cache.manifests.publish({"/nowhere/1.tar": _record(1)})
    claim = cache.claims.claim(specs=[model_spec(0).id])
    assert list(collect(cache, NOW)) == []
    cache.claims.release([claim])
    assert [each.reason for each in collect(cache, NOW)] == ["of no generation"]


@pytest.mark.parametrize("work", ["claim", "publish"])
def test_a_collection_sees_what_happened_since_it_chose_what_goes(cache, monkeypatch, work):
    cache.write(_id(1), table(), PIXELS, maps())
    posted = cache.notices.posted

    def first(paths):
        if work == "claim":
            Path(cache.url, "claims").mkdir()
            path = f"claims/{'c' * 32}.json"
            cache.objects.put(path, seal({"shards": [_id(1)], "specs": []}, path))
        else:
            cache.manifests.publish({"/nowhere/1.tar": _record(1)})
        return posted(paths)

    monkeypatch.setattr(cache.notices, "posted", first)
    assert list(collect(cache, NOW)) == []
    assert cache.has_entry(_id(1), PIXELS)


def test_a_writer_that_comes_too_late_makes_the_entry_again(cache):
    cache.write(_id(1), table(), PIXELS, maps())
    found = []

    def write():
        other = ScoreCache(cache.url)
        other.claims.claim(shards=[_id(1)])
        found.append(other.has_entry(_id(1), None))

    with cache.notices.posted([f"shards/{_id(1)}"]):
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        time.sleep(0.3)
        cache.objects.delete([each.path for each in cache.objects.below(f"shards/{_id(1)}")])
    writer.join()
    assert found == [False]


def test_claims_of_killed_writers_end_after_a_day(cache):
    cache.write(_id(1), table(), PIXELS, maps())
    cache.claims.claim(shards=[_id(1)])
    (path,) = Path(cache.url).glob("claims/*")
    os.utime(path, (time.time() - 20 * 3600,) * 2)
    assert list(collect(cache, NOW)) == []
    os.utime(path, (time.time() - 28 * 3600,) * 2)
    reasons = [each.reason for each in collect(cache, NOW)]
    assert reasons == ["a killed writer's claim", "no manifest names it"]
    assert not path.exists()


def test_packs_go_when_hardly_any_of_their_shards_are_named(cache, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(5):
        cache.write(_id(number), table(), PIXELS, maps())
        (tars / f"{number}.tar").touch()
    cache.manifests.publish({f"{tars}/{number}.tar": _record(number) for number in range(5)})
    pack = write_pack(cache, [_id(number) for number in range(5)], PIXELS)
    write_pack(cache, [_id(number) for number in range(3)], PIXELS)
    (tmp_path / "cache" / pack.folder / "mine.txt").touch()
    unfinished = tmp_path / "cache" / "packs" / ("f" * 32)
    shutil.copytree(tmp_path / "cache" / pack.folder / "maps", unfinished / "maps")
    assert list(collect(cache, Collection())) == []  # all are young
    assert len([each.what for each in collect(cache, dataclasses.replace(NOW, dry_run=True))]) == 2
    gone = [each.what for each in collect(cache, NOW)]
    assert len(gone) == 2
    assert f"packs/{unfinished.name}" in gone
    assert sound_packs(cache) == [pack]
    assert list(collect(cache, NOW)) == []
    for number in range(3):
        (tars / f"{number}.tar").unlink()
    reasons = Counter(each.reason for each in collect(cache, NOW))
    assert reasons["a pack that hardly anything needs"] == 1
    assert sound_packs(cache) == []
    assert [path.name for path in (tmp_path / "cache" / "packs").rglob("*.*")] == ["mine.txt"]


def test_a_damaged_pack_keeps_nothing_from_being_collected(cache):
    cache.write(_id(1), table(), PIXELS, maps())
    pack = write_pack(cache, [_id(1)], PIXELS)
    path = Path(cache.url) / pack.folder / "zarr.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert [each.what for each in collect(cache, NOW)] == [_id(1), pack.folder]
    assert not [path for path in Path(cache.url).rglob("*") if path.is_file()]


def test_a_staging_file_of_a_live_writer_stays_without_an_age_limit_too(cache):
    cache.write(_id(1), table(), PIXELS, maps())
    new, old = (Path(cache.url, "shards", _id(1), f"zarr.json#{number}") for number in (1, 2))
    for each in (new, old):
        each.touch()
    ago = time.time() - 660
    os.utime(old, (ago, ago))
    assert "a staging file" in {each.reason for each in collect(cache, NOW)}
    assert new.exists()
    assert not old.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_thirty_jobs_beside_collections_without_an_age_limit_lose_nothing(tmp_path, seed):
    """Writers of 12 shards and of generations, runs that take them up, and two gc at once."""
    url = ScoreCache(str(tmp_path / "cache"), create=True).url
    (tmp_path / "cache" / "mine#1").touch()
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(12):
        (tars / f"{number}.tar").touch()
    started = time.monotonic()
    failures, done = [], Counter()

    def job(work, number):
        cache, rng = ScoreCache(url), random.Random(1000 * seed + number)
        try:
            while time.monotonic() < started + 20 and not failures:
                work(cache, rng, number)
                done[work.__name__] += 1
        except BaseException as error:
            failures.append(error)
            raise

    def ensure(cache, spec, number):
        if not cache.has_entry(_id(number), spec):
            cache.write(_id(number), table(), spec, maps())

    def score(cache, rng, _):
        number = rng.randrange(12)
        claim = cache.claims.claim(shards=[_id(number)])
        ensure(cache, PIXELS, number)
        time.sleep(rng.random() / 10)
        if rng.random() < 0.3:
            cache.claims.release([claim])  # it failed on something else
            return
        cache.manifests.publish({f"{tars}/{number}.tar": _record(number)})
        cache.claims.release([claim])
        cache.read_maps([_id(number)], PIXELS)

    def refresh(cache, rng, number):
        """Two runs with equal seeds: both give the same encoders, one after the other."""
        run, step = f"run-{number % 2}", int(10 * (time.monotonic() - started))
        spec = model_spec(step % 7)
        claim = cache.claims.claim(specs=[spec.id])
        for shard in DATA:
            ensure(cache, spec, shard)
        cache.generations.publish(Generation(run, step, [spec], "d", 2))
        cache.claims.release([claim])
        collect_superseded(cache, run, map(_id, DATA))

    def train(cache, rng, number):
        """Takes up a generation, and reads it again and again as resumes would."""
        run = f"run-{rng.randrange(2)}"
        known = cache.generations.of(run)
        if not known:
            time.sleep(0.1)
            return
        wanted = rng.choice(known)
        cache.generations.need(run, [wanted.step], by=f"user-{number}")
        if wanted in cache.generations.of(run):  # or it was about to go when it was chosen
            for _ in range(3):
                cache.read_maps([_id(shard) for shard in DATA], wanted.specs[0])
                done["read"] += 1
                time.sleep(rng.random() / 20)

    def gc(cache, rng, _):
        done["removed"] += len(list(collect(cache, NOW)))

    jobs = [(score, 12), (refresh, 8), (train, 10), (gc, 2)]
    threads = [
        threading.Thread(target=job, args=(work, number), daemon=True)
        for work, count in jobs
        for number in range(count)
    ]
    records = {f"/nowhere/{shard}.tar": _record(shard) for shard in DATA}
    ScoreCache(url).manifests.publish(records)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"seed {seed}: {dict(done)}")
    assert not failures
    assert done["removed"] > 10
    assert done["read"] > 10
    cache = ScoreCache(url)
    for name, record in cache.manifests.read(str(tars)).items():
        assert len(cache.read_maps([record.shard_id], PIXELS)[0]) == 2, name
    for run in cache.generations.runs():
        for each in cache.generations.of(run):
            cache.read_maps([_id(shard) for shard in DATA], each.specs[0])
    assert (tmp_path / "cache" / "mine#1").exists()
    assert not list(cache.objects.below("notices"))
    assert not list(cache.objects.below("claims"))
