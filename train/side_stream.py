"""A second CUDA stream, which prepares the next batch while the step computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


class SideStream:
    """The stream of the next batch. On a CPU there is none: `is_open` is False, calls do nothing.

    Preparing a batch reads the weights (for attention). So it waits for the update before the
    running step, and the running step's own update waits for it:

        loss = forward_backward(batch)
        with side_stream:
            ahead = side_stream.hand_over(make_batch())
        side_stream.join()
        optimizer.step()
        side_stream.weights_are_ready()
    """

    def __init__(self, device: torch.device) -> None:
        # High priority: the step fills the GPU, and the next step waits for this stream.
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

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)
            self._context = None

    def hand_over(self, batch: Batch) -> Batch:
        """Keep the memory of a batch made in this stream until the main stream has used it.

        Args:
            batch: a dataclass of tensors, or of such dataclasses.
        """
        if self._stream is not None:
            main = torch.cuda.default_stream(self._stream.device)
            for tensor in _tensors(batch):
                if tensor.is_cuda:
                    tensor.record_stream(main)
        return batch

    def join(self) -> None:
        """Let the main stream wait for this one."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def weights_are_ready(self) -> None:
        """Mark the point in the main stream at which the weights are up to date."""
        if self._stream is not None:
            self._ready = torch.cuda.current_stream().record_event()


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in a dataclass, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for each in vars(value).values():
            yield from _tensors(each)
