import threading
import time

import pytest

from pipeline import notices
from pipeline.notices import Notices
from pipeline.objects import Objects
from pipeline.sealed import CacheError

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
        thread = threading.Thread(target=writer)
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
