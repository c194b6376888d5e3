"""Maps of a new generation, read by a thread while the training goes on."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable

from torch import Tensor

from famt.pipeline import storage
from famt.pipeline.errors import CacheError
from famt.pipeline.generations import Generation

_POLL = 2.0  # seconds
_RETRY = 60.0  # seconds


class ReadAhead(threading.Thread):
    """Reads the newest generation into RAM as soon as it is there.

    Args:
        newest: gives the newest generation that a run could take up.
        load: reads its maps.

    Attributes:
        ready: the newest generation that was read, with its maps `[R, G, G]` by kind, until it is
            taken up.
        lost: why the newest could not be read when it was last tried, and its step if it is known;
            None if all is well.
    """

    def __init__(
        self,
        newest: Callable[[], Generation | None],
        load: Callable[[Generation], dict[str, Tensor]],
    ) -> None:
        super().__init__(daemon=True)
        self.ready: tuple[Generation, dict[str, Tensor]] | None = None
        self.lost: tuple[int | None, str] | None = None
        self._newest, self._load = newest, load
        self._stopped = threading.Event()
        self._seen = -1
        self._changing = threading.Lock()  # `ready` and `_seen`

    def run(self) -> None:
        pause = _POLL
        while not self._stopped.wait(pause):
            pause, newest = _POLL, None
            try:
                newest = self._newest()
                if newest is not None and newest.step > self._seen:
                    maps = self._load(newest)
                    with self._changing:
                        if newest.step > self._seen:
                            self.ready, self._seen = (newest, maps), newest.step
                self.lost = None
            except CacheError as error:  # maps that were collected, or are damaged: look again
                self.lost = (newest.step if newest else None, storage.reason(error))
            except storage.UNREACHABLE:
                continue
            except Exception:  # a defect; the training goes on with the maps that it has
                traceback.print_exc()
                pause = _RETRY

    def forget(self, step: int) -> None:
        """Give the memory of a generation free that was taken up."""
        with self._changing:
            if self.ready and self.ready[0].step <= step:
                self.ready = None
            self._seen = max(self._seen, step)

    def stop(self) -> None:
        self._stopped.set()
