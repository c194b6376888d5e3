import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from famt.pipeline import notices
from famt.pipeline.errors import CacheError
from famt.pipeline.notices import Claimed, Claims, Notices
from famt.pipeline.objects import Objects
from famt.pipeline.sealed import seal

ENTRY = f"shards/{'a' * 32}"


@pytest.fixture
def objects(tmp_path):
    return Objects(str(tmp_path / "cache"), create=True)


@pytest.mark.parametrize("doomed", [ENTRY, f"{ENTRY}/lowpass-0123456789ab"])
def test_a_writer_waits_while_its_objects_may_be_deleted(objects, doomed):
    events = []

    def writer():
        Notices(objects).wait({ENTRY})
        events.append("waited")

    with Notices(objects).posted([doomed, "shards/other"]):
        thread = threading.Thread(target=writer, daemon=True)
        thread.start()
        time.sleep(0.3)
        events.append("deleted")
    thread.join()
    assert events == ["deleted", "waited"]


def test_nobody_waits_for_what_concerns_others_or_is_done(objects):
    with Notices(objects).posted([ENTRY]):
        Notices(objects).wait({f"shards/{'b' * 32}"})
    Notices(objects).wait({ENTRY})
    assert list(objects.below("notices")) == []


def test_a_killed_collections_notice_is_taken_away_by_who_waited_long_enough(objects):
    killed = Notices(objects).posted([ENTRY])
    killed.__enter__()
    Notices(objects).wait({ENTRY}, patience=0.3)
    assert list(objects.below("notices")) == []


def test_a_collection_knows_when_its_time_is_over(objects, monkeypatch):
    monkeypatch.setattr(notices, "WORKS", 0.2)
    with Notices(objects).posted([ENTRY]) as in_time:
        assert in_time()
        time.sleep(0.3)
        assert not in_time()
    assert notices.DEAD > 2 * notices.WORKS


def test_a_damaged_notice_is_named_with_the_remedy(objects):
    objects.put(f"notices/{'c' * 32}.json", b"{}")
    with pytest.raises(CacheError, match=r"c\.json is damaged.*Remove it"):
        Notices(objects).wait({ENTRY})


def test_claims_hold_until_they_are_released(objects):
    claims = Claims(objects)
    first = claims.claim(shards=["a", "b"])
    second = claims.claim(shards=["b"], specs=["lowpass-0123456789ab"])
    assert claims.held() == Claimed({"a", "b"}, {"lowpass-0123456789ab"})
    claims.release([first])
    assert claims.held().shards == {"b"}
    claims.release([second, first])
    assert claims.held() == Claimed(set(), set())


def test_who_claims_a_spec_waits_for_any_collection_of_maps(objects):
    events = []

    def writer():
        Claims(objects).claim(specs=["lowpass-0123456789ab"])
        events.append("claimed")

    with Notices(objects).posted([f"{ENTRY}/lowpass-0123456789ab"]):
        thread = threading.Thread(target=writer, daemon=True)
        thread.start()
        time.sleep(0.3)
        events.append("deleted")
    thread.join()
    assert events == ["deleted", "claimed"]


def test_a_claim_outlives_its_term_while_its_writer_works(objects, monkeypatch):
    monkeypatch.setattr(notices, "HOLDS", timedelta(seconds=2))
    claims = Claims(objects)
    with claims.claimed(["lowpass-0123456789ab"]):
        (path,) = Path(objects.url, "claims").iterdir()
        first = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns < first + 2 * 10**9:
            assert claims.held().specs == {"lowpass-0123456789ab"}
            assert claims.outdated() == []
            time.sleep(0.1)
    assert claims.held().specs == set()


def test_a_damaged_claim_is_named_with_the_remedy(objects):
    path = f"claims/{'c' * 32}.json"
    objects.put(path, seal({"shards": 1}, path))
    with pytest.raises(CacheError, match=r"c\.json is damaged \(it lacks.*Remove it"):
        Claims(objects).held()
