import os
import random
import tempfile
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from cache_layouts import SPECS, make, maps, table
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.gc import collect
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.errors import CacheError
from famt.pipeline.storage import Version

NOW = timedelta(0)
SPEC = SPECS[0]
SEED = int(os.environ.get("FAMT_SEED", "0"))


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
    dry = [each.what for each in collect(layout.cache, dry_run=True)]
    assert _files(layout.cache.url) == before
    removed = [each.what for each in collect(layout.cache)]
    assert sorted(removed) == sorted(dry)
    after = _files(layout.cache.url)
    changed = {path for path in before if after.get(path) != before[path]}
    assert not changed & layout.foreign
    assert not changed & layout.keep
    # A manifest clears its own old versions away.
    assert not {path.parent for path in changed if "datasets" not in path.parts} & layout.young
    left = {path.parent for path in after if path.parts[-3] == "shards" and path.suffix == ".zip"}
    assert left - layout.young <= {path.parent for path in layout.keep | layout.foreign}
    for folder, names in layout.records.items():
        assert set(layout.cache.manifests.read(folder)) == names
    assert list(collect(layout.cache)) == []


@pytest.mark.parametrize("layouts", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_nothing_needed_is_lost_and_nothing_foreign_is_touched(layouts):
    @settings(max_examples=layouts)
    @given(st.integers(0, 2**64))
    def collect_from_any(seed):
        with tempfile.TemporaryDirectory() as root:
            _collect_from(make(Path(root), seed))

    collect_from_any()


def test_nothing_goes_while_what_names_it_is_damaged(cache):
    cache.write(_id(1), table(), SPEC, maps())
    cache.manifests.publish({"/nowhere/1.tar": _record(1)})
    (path,) = Path(cache.url).glob("datasets/*/*.json")
    path.write_bytes(path.read_bytes()[:-9])
    before = _files(cache.url)
    with pytest.raises(CacheError, match="is damaged"):
        list(collect(cache, NOW))
    assert _files(cache.url) == before


@pytest.mark.parametrize("moment", ["get", "delete"])
def test_what_gets_a_name_while_it_is_deleted_is_put_back(cache, monkeypatch, moment):
    """A job finds an older job's entry, and publishes its record just before or after it goes."""
    cache.write(_id(1), table(), SPEC, maps())
    cache.write(_id(2), table(), SPEC, maps())
    before = _files(cache.url)
    act = getattr(cache.store, moment)

    def publish_too(what):
        found = act(what)
        ScoreCache(cache.url).manifests.publish({"/nowhere/1.tar": _record(1)})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cache.store, moment, publish_too)
        assert [each.what for each in collect(cache, NOW)] == [_id(2)]
    left = {path: data for path, data in _files(cache.url).items() if path.suffix == ".zip"}
    assert left == {path: data for path, data in before.items() if _id(1) in str(path)}


def test_a_staging_file_of_a_live_writer_stays_without_an_age_limit_too(cache):
    cache.write(_id(1), table(), SPEC, maps())
    new, old = (Path(cache.url, "shards", _id(1), f"table.zip#{number}") for number in (1, 2))
    for each in (new, old):
        each.touch()
    ago = time.time() - 660
    os.utime(old, (ago, ago))
    assert "a staging file" in {each.reason for each in collect(cache, NOW)}
    assert new.exists()
    assert not old.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2 * SEED, 2 * SEED + 2))
def test_thirty_jobs_beside_two_collections_without_an_age_limit_lose_nothing(tmp_path, seed):
    """Each job puts what is missing, publishes it, and looks again, over and over."""
    url = ScoreCache(str(tmp_path / "cache"), create=True).url
    (tmp_path / "cache" / "mine#1").touch()
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(12):
        (tars / f"{number}.tar").touch()
    end = time.monotonic() + 20
    failures, done = [], Counter()

    def job(work, number):
        cache, rng = ScoreCache(url), random.Random(1000 * seed + number)
        try:
            while time.monotonic() < end and not failures:
                work(cache, rng)
                done[work.__name__] += 1
        except BaseException as error:
            failures.append(error)
            raise

    def whole(cache, number):
        return cache.has(_id(number)) and cache.has(_id(number), SPEC)

    def ensure(cache, number):
        if not whole(cache, number):
            cache.write(_id(number), table(), SPEC, maps())

    def score(cache, rng):
        number = rng.randrange(12)
        ensure(cache, number)
        time.sleep(rng.random() / 10)
        if rng.random() < 0.3:
            return  # it failed on something else
        cache.manifests.publish({f"{tars}/{number}.tar": _record(number)})
        ensure(cache, number)

    def forget(cache, rng):
        """Someone removes a record: its entry is garbage again."""
        time.sleep(rng.random())
        if records := cache.manifests.read(str(tars)):
            name = rng.choice(sorted(records))
            cache.manifests.forget(str(tars), {name: records[name]})

    def gc(cache, rng):
        done["removed"] += len(list(collect(cache, NOW)))

    jobs = [(score, 26), (forget, 2), (gc, 2)]
    threads = [
        threading.Thread(target=job, args=(work, number), daemon=True)
        for work, count in jobs
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"seed {seed}: {dict(done)}")
    assert not failures
    assert done["removed"] > 10
    cache = ScoreCache(url)
    for name, record in cache.manifests.read(str(tars)).items():
        assert cache.read_table(record.shard_id).kept == 2, name
        assert len(cache.read_maps(record.shard_id, SPEC)) == 2, name
    assert (tmp_path / "cache" / "mine#1").exists()
