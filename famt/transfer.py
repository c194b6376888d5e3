"""Tensors on their way to a device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; towards a GPU the copy is queued, and the host goes on at once.

    Only from pinned memory a copy needs no wait. torch keeps such memory until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Fetched:
    """A tensor on its way from a device to the host: copied behind the work that makes it.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def get(self) -> Tensor:
        """The tensor on the CPU; waits for that copy alone."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor
