"""Times of the stages of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the time of named stages.

    GPU work is timed by events in its stream, so that nothing waits; stages in different streams
    may overlap. Work of the host, such as waiting for data, is timed with `on_host`.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Time the body of the context."""
        if self._events and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pairs.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds of each stage since the last call; waits for the GPU."""
        for name, start, end in self._pairs:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._pairs.clear()
        self._seconds.clear()
        return seconds
