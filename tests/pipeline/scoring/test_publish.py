from datetime import timedelta

from samples import photo_members, write_tar

from famt.pipeline import storage
from famt.pipeline.caching.gc import collect
from famt.pipeline.scoring import publish
from famt.pipeline.scoring.precompute import precompute_shard
from famt.pipeline.scoring.publish import Publisher


def test_reports_wait_while_the_cache_can_not_be_written(tmp_path, cache, spec, monkeypatch):
    url = str(write_tar(tmp_path / "0.tar", photo_members(2)))
    publisher = Publisher(cache, spec)
    publisher.add(precompute_shard(url, cache, spec))

    def refuse(*_):
        raise OSError("Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", refuse)
        assert "Read-only" in publisher.flush()
    assert [each.url for each in publisher.waiting] == [url]
    assert not cache.manifests.lookup([url])
    assert publisher.flush() == ""
    assert publisher.waiting == publisher.lost == []
    assert url in cache.manifests.lookup([url])


def test_reports_are_published_at_intervals_and_what_gc_took_is_named(
    tmp_path, cache, spec, monkeypatch
):
    monkeypatch.setattr(publish, "_INTERVAL", 0.0)
    url = str(write_tar(tmp_path / "0.tar", photo_members(2)))
    publisher = Publisher(cache, spec)
    report = precompute_shard(url, cache, spec)
    assert len(list(collect(cache, timedelta(0)))) == 1
    publisher.add(report)
    assert (publisher.waiting, publisher.lost) == ([], [url])
