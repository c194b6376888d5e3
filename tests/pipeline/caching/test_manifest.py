from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.storage import Version


def _record(n):
    return ShardRecord(Version(n, f"stamp {n}"), f"{n:032x}")


def test_manifests_are_merged_by_folder(cache):
    cache.manifests.publish({"/data/a/0.tar": _record(0), "s3://b/c/1.tar": _record(1)})
    cache.manifests.publish({"/data/a/2.tar": _record(2), "/data/a/0.tar": _record(3)})
    assert cache.manifests.read("/data/a") == {"0.tar": _record(3), "2.tar": _record(2)}
    assert cache.manifests.lookup(["s3://b/c/1.tar", "/data/a/9.tar"]) == {
        "s3://b/c/1.tar": _record(1)
    }
    assert cache.manifests.read("/data") == {}


def test_what_was_published_anew_is_not_forgotten(cache):
    cache.manifests.publish({"/data/0.tar": _record(0), "/data/1.tar": _record(1)})
    seen = cache.manifests.read("/data")
    cache.manifests.publish({"/data/1.tar": _record(9), "/data/2.tar": _record(2)})
    cache.manifests.forget("/data", seen)
    assert cache.manifests.read("/data") == {"1.tar": _record(9), "2.tar": _record(2)}


def test_publishing_what_is_known_writes_nothing(cache):
    cache.manifests.publish({"/data/0.tar": _record(0)})
    before = list(Path(cache.url).rglob("*.json"))
    cache.manifests.publish({"/data/0.tar": _record(0)})
    assert list(Path(cache.url).rglob("*.json")) == before


def test_many_publishers_at_once_lose_nothing(cache):
    def publish(n):
        ScoreCache(cache.url).manifests.publish({f"/data/{n}.tar": _record(n)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(200)))
    assert cache.manifests.read("/data") == {f"{n}.tar": _record(n) for n in range(200)}
    assert len(list(Path(cache.url).rglob("*.json"))) <= 5  # old versions are cleared away


def test_a_publisher_that_slept_through_many_versions_still_gets_its_records_in(cache, monkeypatch):
    """Its number is free again, since the version that took it was cleared away meanwhile."""
    cache.manifests.publish({"/data/0.tar": _record(0)})
    put, slept = storage.put, []

    def slow_put(*args, **options):
        if not slept:
            slept.append(True)
            for n in range(1, 9):
                ScoreCache(cache.url).manifests.publish({f"/data/{n}.tar": _record(n)})
        return put(*args, **options)

    monkeypatch.setattr(storage, "put", slow_put)
    cache.manifests.publish({"/data/late.tar": _record(99)})
    expected = {f"{n}.tar": _record(n) for n in range(9)} | {"late.tar": _record(99)}
    assert cache.manifests.read("/data") == expected


def test_a_tar_in_the_root_of_the_file_system_has_a_folder(cache):
    cache.manifests.publish({"/0.tar": _record(0)})
    assert cache.manifests.folders() == {"/": {"0.tar": _record(0)}}
    assert cache.manifests.lookup(["/0.tar"]) == {"/0.tar": _record(0)}
