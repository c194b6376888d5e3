import os
import random
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cache_layouts import PIXELS, make, maps, model_spec, table
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import ScoreCache
from pipeline.collector import Collection, collect, collect_superseded
from pipeline.generations import Generation
from pipeline.manifest import ShardRecord
from pipeline.sealed import CacheError
from pipeline.storage import Version

NOW = Collection(older_than=timedelta(0))


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


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_needed_is_lost_and_nothing_foreign_is_touched(seed):
    with tempfile.TemporaryDirectory() as root:
        _collect_from(make(Path(root), seed))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64))
def test_nothing_needed_is_lost_in_any_of_many_layouts(seed):
    with tempfile.TemporaryDirectory() as root:
        _collect_from(make(Path(root), seed))


def test_maps_that_two_runs_share_stay_until_neither_needs_them(cache):
    """Two runs of equal seed: their first encoders are the same, so is the id of their maps."""
    cache.write(_id(1), table(), model_spec(0), maps())
    for run in ("a", "b"):
        cache.generations.publish(Generation(run, 0, model_spec(0), "d", 2))
    cache.write(_id(1), table(), model_spec(1), maps())
    cache.generations.publish(Generation("a", 9, model_spec(1), "d", 2))
    assert collect_superseded(cache, "a", [_id(1)]) == []
    assert [each.step for each in cache.generations.of("a")] == [9]
    assert cache.has_entry(_id(1), model_spec(0))
    cache.generations.publish(Generation("b", 9, model_spec(1), "d", 2))
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
        cache.generations.publish(Generation("a", step, model_spec(number), "d", 2))
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
    cache.generations.publish(Generation("a", 0, model_spec(0), "d", 2))
    cache.generations.need("a", [0], by="a")
    (path,) = Path(cache.url).glob(name)
    path.write_bytes(path.read_bytes()[:-9])
    before = _files(cache.url)
    with pytest.raises(CacheError, match="is damaged"):
        list(collect(cache, NOW))
    assert _files(cache.url) == before


def test_a_writer_sees_that_a_collection_took_what_it_had_found(cache):
    """The entry is an older job's, no manifest names it yet: gc is the faster of the two."""
    cache.write(_id(1), table(), PIXELS, maps())
    assert cache.has_entry(_id(1), PIXELS)  # the writer has nothing to do
    assert [each.reason for each in collect(cache, NOW)] == ["no manifest names it"]
    lost = cache.publish({"/nowhere/1.tar": _record(1)}, PIXELS)
    assert set(lost) == {"/nowhere/1.tar"}
    cache.write(_id(1), table(), PIXELS, maps())
    assert cache.publish({"/nowhere/1.tar": _record(1)}, PIXELS) == {}
    assert list(collect(cache, NOW)) == []


def test_a_collection_sees_what_a_writer_named_after_it_looked(cache, monkeypatch):
    """As above, and the writer is the faster: it names the entry when its end is decided."""
    cache.write(_id(1), table(), PIXELS, maps())
    posted = cache.notices.posted

    def name_it_first(paths):
        cache.manifests.publish({"/nowhere/1.tar": _record(1)})
        return posted(paths)

    monkeypatch.setattr(cache.notices, "posted", name_it_first)
    assert list(collect(cache, NOW)) == []
    assert cache.publish({"/nowhere/1.tar": _record(1)}, PIXELS) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_thirty_jobs_beside_collections_without_an_age_limit_lose_nothing(tmp_path, seed):
    """Writers of 12 shards and of generations, runs that take them up, and two gc at once."""
    url = ScoreCache(str(tmp_path / "cache"), create=True).url
    (tmp_path / "cache" / "mine#1").touch()
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(12):
        (tars / f"{number}.tar").touch()
    end = time.monotonic() + 20
    failures, collections, again = [], [], []

    def job(work, number):
        cache, rng = ScoreCache(url), random.Random(1000 * seed + number)
        try:
            while time.monotonic() < end:
                work(cache, rng, number)
        except BaseException as error:
            failures.append(error)
            raise

    def ensure(cache, spec, number):
        if not cache.has_entry(_id(number), spec):
            cache.write(_id(number), table(), spec, maps())

    def score(cache, rng, _):
        numbers = rng.sample(range(12), 3)
        for number in numbers:
            ensure(cache, PIXELS, number)
        records = {f"{tars}/{number}.tar": _record(number) for number in numbers}
        for url in cache.publish(records, PIXELS):
            again.append(url)
            ensure(cache, PIXELS, int(Path(url).stem))
        assert cache.publish(records, PIXELS) == {}

    def refresh(cache, rng, number):
        """Two runs with equal seeds, of each the encoders one after the other."""
        run, step = f"run-{number % 2}", len(again) + int(10 * (time.monotonic() - end + 20))
        spec = model_spec(step % 7)
        for shard in range(2):
            ensure(cache, spec, 100 + shard)
        made = Generation(run, step, spec, "d", 2)
        for shard_id in cache.publish_generation(made, [_id(100), _id(101)]):
            again.append(shard_id)
            ensure(cache, spec, int(shard_id, 16))
        collect_superseded(cache, run, [_id(100), _id(101)])

    def train(cache, rng, number):
        """Takes up a generation, and reads it again and again as resumes would."""
        run = f"run-{rng.randrange(2)}"
        known = cache.generations.of(run)
        if not known:
            return
        wanted = rng.choice(known)
        cache.generations.need(run, [wanted.step], by=f"user-{number}")
        if wanted not in cache.generations.of(run):
            return  # it was about to go when it was chosen
        try:
            cache.read_maps([_id(100), _id(101)], wanted.spec)
        except CacheError:
            time.sleep(0.3)  # published a moment ago, and its job is making it whole again
        for _ in range(3):
            cache.read_maps([_id(100), _id(101)], wanted.spec)
            time.sleep(rng.random() / 20)

    def gc(cache, rng, _):
        collections.append(list(collect(cache, NOW)))

    jobs = [(score, 12), (refresh, 8), (train, 10), (gc, 2)]
    threads = [
        threading.Thread(target=job, args=(work, number))
        for work, count in jobs
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(map(len, collections)) > 10
    cache = ScoreCache(url)
    assert len(cache.manifests.read(str(tars))) == 12
    for number in range(12):
        assert len(cache.read_maps([_id(number)], PIXELS)[0]) == 2
    for run in cache.generations.runs():
        for each in cache.generations.of(run):
            cache.read_maps([_id(100), _id(101)], each.spec)
    assert (tmp_path / "cache" / "mine#1").exists()
    assert not list(cache.objects.below("notices"))
