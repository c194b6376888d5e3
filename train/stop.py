"""Stopping a run from outside, by a signal."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """Long work was broken off because the run was asked to stop."""


class Stop:
    """While open, SIGTERM, SIGUSR1 and the first SIGINT (Ctrl-C) set a flag and end nothing.

    Attributes:
        asked: whether this process got one of them; the ranks compare notes once per step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        # Only a process's main thread may handle signals; Ray Train runs its function in another.
        if threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Call now and then during long work.

        Raises:
            Stopped: the run was asked to stop.
        """
        if self.asked:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            message = "\nstopping after this step, with a checkpoint; Ctrl-C again quits at once"
            print(message, flush=True)
