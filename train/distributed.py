"""One process or many: what torchrun or Ray Train sets up, and what one process does without."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from famt.pipeline import storage
from famt.pipeline.errors import RankError, UserError

# Ranks may wait for a slow disk or a generation of maps. Of a rank that died they learn at once, as
# the kernel closes its connections.
_PATIENCE = timedelta(days=1)
_GRACE = 2.0  # seconds in which ranks that are alive report
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world_size: 0 and 1 without a launcher.
        node: name of the machine; its ranks have it in common (`machine`).
        device: what this process computes on.
        control: group of all ranks for messages, apart from the gradients'.
    """

    rank: int
    world_size: int
    node: str
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, pictures and checkpoints."""
        return self.rank == 0

    def of_machine(self) -> list[int]:
        """The ranks of this machine; all ranks call it."""
        nodes = self.gather(self.node)
        return [rank for rank, node in enumerate(nodes) if node == self.node]

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any(self, wish: bool) -> bool:
        """Whether any rank wishes something; as cheap as a message can be, for every step."""
        if self.world_size == 1:
            return wish
        wishes = torch.tensor(int(wish))
        dist.all_reduce(wishes, group=self.control)
        return bool(wishes)

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

        The first rank of each machine makes it and writes it to a file in /dev/shm, whose name goes
        as soon as all have mapped it. What one rank then writes into a tensor, all of that machine
        read.

        Raises:
            Exception: what `make` raised, on every rank; OSError: /dev/shm is too small.
        """
        if self.world_size == 1:
            return make()
        leads = self.gather(self.node).index(self.node) == self.rank
        made: str | Exception | None = None
        if leads:
            try:
                made = _write_shared(make())
            except Exception as error:  # the other ranks wait for an answer
                made = error
        paths = self.gather((self.node, made))
        try:
            for _, each in paths:
                if isinstance(each, Exception):
                    raise each
            path = next(each for node, each in paths if each and node == self.node)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                shared: Shared = torch.load(path, mmap=True, weights_only=False)
            self.gather(None)  # all have mapped it
            return shared
        finally:
            if isinstance(made, str):
                os.unlink(made)


def _write_shared(value: object) -> str:
    """Save a value to a new file in /dev/shm; returns its path.

    Raises:
        OSError: it has not enough room.
    """
    path = f"{_SHARED_MEMORY}/famt-{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        Path(path).unlink(missing_ok=True)
        free = shutil.disk_usage(_SHARED_MEMORY).free
        raise OSError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, too few for what the ranks of this "
            "machine share; enlarge it (docker run --shm-size, or mount -o remount,size=... "
            f"{_SHARED_MEMORY})"
        ) from error
    return path


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
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that a launcher announces (NCCL on GPUs, gloo on CPUs), and leave it.

    A process group that exists already (Ray Train's) is used as it is, and who made it looks after
    its processes. Otherwise a rank that fails or is lost ends the others: their next collective
    fails, or torchrun kills them 30 s later.

    Args:
        device: "auto" for a GPU if there is one, "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where there is none.
        RankError: another rank failed or was lost; says which.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _warn_of_an_idle_gpu()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # What is left to the host is small; a thread a core only spins, beside those that decode.
        torch.set_num_threads(1)
    ours = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if not dist.is_initialized():
        yield Ranks(0, 1, machine(), chosen)
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]
    ranks = Ranks(rank, world_size, machine(), chosen, control)
    if not ours:
        yield ranks
        return
    names = ranks.gather(f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
    try:
        yield ranks
    except Exception as error:
        cause = _first_failure(error, rank, names, control)
        if cause is None:
            raise
        raise RankError(cause) from error
    dist.destroy_process_group()


def _first_failure(
    error: Exception, rank: int, names: list[str], control: dist.ProcessGroup
) -> str | None:
    """Why another rank made this one fail, or None if the error is its own.

    Collectives raise RuntimeErrors when a rank is gone. Each rank that fails writes its error to
    the store that the ranks met in; one that writes nothing is lost.
    """
    store = dist.distributed_c10d._get_default_store()
    in_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    own = "" if in_collective else f"{names[rank]} failed: {storage.reason(error)}"
    keys = [f"failed/{each}" for each in range(len(names))]
    try:
        store.set(keys[rank], own)
        if not in_collective:
            dist.destroy_process_group(control)  # closes connections, which the others notice
        until = time.monotonic() + _GRACE
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.1)
        silent = [name for name, key in zip(names, keys, strict=True) if not store.check([key])]
        causes = [store.get(key).decode() for key in keys if store.check([key])]
        if rank == 0:
            time.sleep(_GRACE)  # the store may be in this process, and others read it still
    except RuntimeError:
        silent, causes = names[:1], []
    if not in_collective:
        return None
    lost = f"{silent[0]} was lost" if len(silent) == 1 else f"one was lost of {', '.join(silent)}"
    return next(filter(None, causes), lost if silent else str(error))


def data_parallel(
    model: nn.Module, ranks: Ranks, *, compile: bool = False
) -> tuple[nn.Module, Callable[[], AbstractContextManager]]:
    """A model whose gradients are the mean over the ranks, and a context in which they are not yet.

    Args:
        compile: it as well, by `torch.compile`.
    """
    trained = model
    no_sync: Callable[[], AbstractContextManager] = contextlib.nullcontext
    if ranks.world_size > 1:
        trained = parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        no_sync = parallel.no_sync
    if compile:  # after the former, whose buckets it then computes in parallel
        trained = torch.compile(trained)  # type: ignore[assignment]
    return trained, no_sync


def _warn_of_an_idle_gpu() -> None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _DRIVER.exists() and not hidden:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA at all"
        print(
            f"warning: this machine has an NVIDIA GPU that torch {torch.__version__} can't use, so "
            f"the CPU computes. Compare `nvidia-smi` with what torch was built for ({built}), and "
            "see that a container is given the GPU; or give --device cpu",
            file=sys.stderr,
        )
