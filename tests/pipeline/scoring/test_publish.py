from datetime import timedelta

import pytest
from samples import photo_members, write_tar

from famt.pipeline import storage
from famt.pipeline.caching.gc import collect
from famt.pipeline.caching.validity import look_up
from famt.pipeline.scoring import publish
from famt.pipeline.scoring.precompute import precompute_shard
from famt.pipeline.scoring.publish import score_and_publish


@pytest.fixture
def url(tmp_path):
    return str(write_tar(tmp_path / "0.tar", photo_members(2)))


def test_what_was_scored_but_not_recorded_is_named_at_the_end(url, cache, spec, monkeypatch):
    report = precompute_shard(url, cache, spec)

    def refuse(*_):
        raise OSError("Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", refuse)
        scored, (named, reason) = score_and_publish([url], lambda _: [(url, report)], cache, spec)
    assert (scored, named) == ((url, report), url)
    assert "not in the manifest: Read-only" in reason
    assert not cache.manifests.lookup([url])


def test_reports_are_recorded_at_intervals(url, cache, spec, monkeypatch):
    monkeypatch.setattr(publish, "_INTERVAL", 0.0)
    report = precompute_shard(url, cache, spec)
    outcomes = score_and_publish([url], lambda _: [(url, report)], cache, spec)
    assert next(outcomes) == (url, report)
    assert url in cache.manifests.lookup([url])
    assert list(outcomes) == []


def test_what_a_collection_took_before_it_was_recorded_is_scored_again(url, cache, spec):
    rounds = []

    def score(urls):
        rounds.append(urls)
        yield url, precompute_shard(url, cache, spec)
        if len(rounds) == 1:
            assert len(list(collect(cache, timedelta(0)))) == 1

    assert len(list(score_and_publish([url], score, cache, spec))) == 2
    assert rounds == [[url], [url]]
    assert look_up([url], cache, spec).stale == {}
