"""Work beside the step, and the wish to stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import is_dataclass
from types import FrameType, TracebackType
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class SideStream:
    """On a GPU a second stream, in which the next batch is made while the step computes.

    The next batch reads the weights (for attention), so it waits for the update before the running
    step, and that step's own update waits for it. On a CPU there is none (`is_open` is False), and
    all of this does nothing.

        loss = forward_backward(batch)
        with side_stream:
            ahead = side_stream.hand_over(make_batch())
        side_stream.join()
        optimizer.step()
        side_stream.weights_are_ready()
    """

    def __init__(self, device: torch.device) -> None:
        # First in line: the step fills the GPU, and this is what the next one waits for.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.is_open = self._stream is not None
        self._ready: torch.cuda.Event | None = None
        self._context: AbstractContextManager | None = None

    def __enter__(self) -> None:
        if self._stream is not None:
            if self._ready is not None:
                self._stream.wait_event(self._ready)
            else:
                self._stream.wait_stream(torch.cuda.current_stream())
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, trace)
            self._context = None

    def hand_over(self, batch: Batch) -> Batch:
        """Keep the memory of a batch made in this stream until the main stream has used it.

        Args:
            batch: a dataclass of tensors, and of dataclasses of tensors.
        """
        if self._stream is not None:
            main = torch.cuda.default_stream(self._stream.device)
            for tensor in _tensors(batch):
                if tensor.is_cuda:
                    tensor.record_stream(main)
        return batch

    def join(self) -> None:
        """Let the main stream wait for what was done in this one."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def weights_are_ready(self) -> None:
        """Tell this stream that the weights are updated up to here."""
        if self._stream is not None:
            self._ready = torch.cuda.current_stream().record_event()


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in a dataclass, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for each in vars(value).values():
            yield from _tensors(each)


class Stopped(Exception):
    """Work that takes long was left, because the run was asked to stop."""


class Stop:
    """Notes SIGTERM, SIGUSR1 and the first SIGINT (Ctrl-C) while it is open, and lives on.

    Attributes:
        asked: whether one of them came to this process; ranks agree on it once a step.
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
        """Let work that takes long ask now and then.

        Raises:
            Stopped: the run was asked to stop.
        """
        if self.asked:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            told = "\nstopping after this step, with a checkpoint; Ctrl-C again leaves at once"
            print(told, flush=True)
