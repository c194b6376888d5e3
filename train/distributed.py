"""One process or many: what torchrun or Ray Train sets up, and what one process does without."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world_size: 0 and 1 without a launcher.
        node: name of the machine; its ranks have it in common (`machine`).
        device: what this process computes on.
    """

    rank: int
    world_size: int
    node: str
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, pictures and checkpoints."""
        return self.rank == 0

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Shared]) -> Shared:
        """What `make` gives on the main rank, on every rank; only that one calls it.

        Raises:
            Exception: what `make` raised, on every rank.
        """
        made: Shared | Exception | None = None
        if self.is_main:
            try:
                made = make()
            except Exception as error:  # the other ranks wait for an answer
                made = error
        made = self.gather(made)[0]
        if isinstance(made, Exception):
            raise made
        return made  # type: ignore[return-value]

    def share(self, make: Callable[[], Shared]) -> Shared:
        """One result of `make` for all ranks of a machine, its tensors in shared memory.

        The first rank of each machine makes it; what one rank then writes into a tensor, all of
        that machine read.

        Raises:
            Exception: what `make` raised, on every rank.
        """
        if self.world_size == 1:
            return make()
        leads = self.gather(self.node).index(self.node) == self.rank
        made: Shared | Exception | None = None
        if leads:
            try:
                made = make()
            except Exception as error:  # the other ranks wait for an answer
                made = error
        torch.multiprocessing.set_sharing_strategy("file_system")  # by name, not by open file
        packed = bytes(ForkingPickler.dumps(made)) if leads else b""
        first = next(each for each in self.gather((self.node, packed)) if each[0] == self.node)
        shared = made if leads else pickle.loads(first[1])
        self.gather(None)  # the leader keeps its tensors until all have opened them
        if isinstance(shared, Exception):
            raise shared
        return shared  # type: ignore[return-value]


def machine() -> str:
    """A name that processes have in common if, and only if, they can share memory by name.

    That is the host's, the kernel's start and the mounted /dev/shm: launchers number machines each
    in their own way or not at all, and containers of one machine may have their own /dev/shm.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text().strip() if boot.exists() else ""
    memory = os.stat("/dev/shm").st_dev if os.path.isdir("/dev/shm") else 0
    return f"{socket.gethostname()} ({kernel[:8]}/{memory})"


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that a launcher announces (NCCL on GPUs, gloo on CPUs), and leave it.

    A process group that exists already (Ray Train's) is used as it is.

    Args:
        device: "auto" for a GPU if there is one, "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    ours = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield Ranks(dist.get_rank(), dist.get_world_size(), machine(), chosen)
        else:
            yield Ranks(0, 1, machine(), chosen)
    finally:
        if ours:
            dist.destroy_process_group()
