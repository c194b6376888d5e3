import threading
import time
from types import SimpleNamespace

import pytest

from famt.train.signals import ahead
from famt.train.signals.ahead import ReadAhead


def _until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(ahead, "_POLL", 0.01)
    monkeypatch.setattr(ahead, "_RETRY", 0.01)
    started = []

    def start(newest, load):
        started.append(ReadAhead(newest, load))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()
        each.join(10)


class Slow:
    """A generation that takes long to be compared, once it is told to, while a newer one comes."""

    def __init__(self, publish):
        self.compared, self._publish = False, publish

    @property
    def step(self):
        if self.compared and threading.current_thread() is threading.main_thread():
            self._publish()
            time.sleep(0.5)
        return 1


def test_a_generation_that_comes_while_another_is_forgotten_is_not_lost(start):
    published = []
    first, second = Slow(lambda: published.append(second)), SimpleNamespace(step=2)
    published.append(first)
    thread = start(lambda: published[-1], lambda generation: {})
    _until(lambda: thread.ready)
    first.compared = True
    thread.forget(1)
    _until(lambda: thread.ready and thread.ready[0] is second)


def test_a_defect_is_shown_and_the_thread_goes_on(start, capfd):
    outcomes = [KeyError("kept")]

    def load(generation):
        if outcomes:
            raise outcomes.pop()
        return {}

    thread = start(lambda: SimpleNamespace(step=1), load)
    _until(lambda: thread.ready)
    assert "KeyError: 'kept'" in capfd.readouterr().err
