"""Ranks: processes started by torchrun or Ray Train, or a single one without a launcher."""

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

# Ranks may wait for a slow disk or a generation of maps. They notice a dead rank at once, as the
# kernel closes its connections.
_PATIENCE = timedelta(days=1)
SEEN_WITHIN = 120.0
"""seconds until every machine sees a new file; NFS clients may keep an old listing for a minute"""

_GRACE = 2.0  # seconds for living ranks to report
_PATIENT_GRACE = 10.0  # the same while more than one rank has not: a busy machine reports late
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world_size: 0 and 1 without a launcher.
        node: name of the machine, the same for all of its ranks (`machine`).
        device: where this process computes.
        control: process group for messages, separate from that of the gradients.
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
        """The ranks of this machine. All ranks must call this."""
        nodes = self.gather(self.node)
        return [rank for rank, node in enumerate(nodes) if node == self.node]

    def leads(self) -> bool:
        """Whether this is the first rank of its machine. All ranks must call this."""
        return self.of_machine()[0] == self.rank

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any(self, wish: bool) -> bool:
        """Whether the argument is true on any rank; cheap enough for every step."""
        if self.world_size == 1:
            return wish
        wishes = torch.tensor(int(wish))
        dist.all_reduce(wishes, group=self.control)
        return bool(wishes)

    def from_main(self, make: Callable[[], Shared]) -> Shared:
        """Call `make` on the main rank alone, and return its result on every rank.

        Raises:
            Exception: what `make` raised, on every rank.
        """
        made: Shared | Exception = self.gather(_outcome(make) if self.is_main else None)[0]
        if isinstance(made, Exception):
            raise made
        return made

    def share(self, make: Callable[[], Shared]) -> Shared:
        """Call `make` once per machine, and share the result's tensors between its ranks.

        The first rank of each machine writes the result to a file in /dev/shm, which is unlinked
        once all have mapped it. Writes into the tensors are seen by all ranks of the machine.

        Raises:
            Exception: what `make` raised, on every rank; OSError: /dev/shm is too small.
        """
        if self.world_size == 1:
            return make()
        made = _outcome(lambda: _write_shared(make())) if self.leads() else None
        paths = self.gather((self.node, made))
        try:
            for _, each in paths:
                if isinstance(each, Exception):
                    raise each
            path = next(each for node, each in paths if each and node == self.node)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                shared: Shared = torch.load(path, mmap=True, weights_only=False)
            self.gather(None)  # wait until all have mapped it
            return shared
        finally:
            if isinstance(made, str):
                os.unlink(made)


def _outcome(make: Callable[[], Shared]) -> Shared | Exception:
    """The result of a call, or its error: the other ranks are waiting for either."""
    try:
        return make()
    except Exception as error:
        return error


def _write_shared(value: object) -> str:
    """Save a value to a new file in /dev/shm; returns its path.

    Raises:
        OSError: there is not enough room.
    """
    path = f"{_SHARED_MEMORY}/famt-{uuid.uuid4().hex}"
    try:
        with open(path, "xb") as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        Path(path).unlink(missing_ok=True)
        free = shutil.disk_usage(_SHARED_MEMORY).free
        raise OSError(
            f"{_SHARED_MEMORY} has only {free / 1e6:.0f} MB free for what the ranks of this "
            "machine share; enlarge it (docker run --shm-size, or mount -o remount,size=... "
            f"{_SHARED_MEMORY})"
        ) from error
    return path


def machine() -> str:
    """A name that is equal for two processes exactly if they can share memory by name.

    It is made of the host name, the kernel's boot id and the device of /dev/shm: launchers number
    machines differently or not at all, and containers may have a /dev/shm of their own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text().strip() if boot.exists() else ""
    memory = os.stat("/dev/shm").st_dev if os.path.isdir("/dev/shm") else 0
    return f"{socket.gethostname()} ({kernel[:8]}/{memory})"


def require_device(device: str) -> None:
    """Refuse "cuda" without a GPU.

    Raises:
        UserError: there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the launcher's process group (NCCL on GPUs, gloo on CPUs); leave it at the end.

    An existing process group (Ray Train's) is used as it is, and its owner handles failures.
    Otherwise, when a rank fails or is lost, the others end too: their next collective fails, or
    torchrun kills them 30 s later.

    Args:
        device: "auto" for a GPU if there is one, "cpu" or "cuda".

    Raises:
        UserError: "cuda" without a GPU.
        RankError: another rank failed or was lost; says which.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            _warn_of_an_idle_gpu()
    require_device(device)
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
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
    """Which other rank made this one fail, and why; None if the error is this rank's own.

    Collectives raise RuntimeErrors when a rank is gone. A failing rank writes its error to the
    rendezvous store; a rank that writes nothing is lost.
    """
    store = dist.distributed_c10d._get_default_store()
    in_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    own = "" if in_collective else f"{names[rank]} failed: {storage.reason(error)}"
    keys = [f"failed/{each}" for each in range(len(names))]
    try:
        store.set(keys[rank], own)
        if not in_collective:
            dist.destroy_process_group(control)  # closes its connections, so that the others notice
        began = time.monotonic()
        while silent := [
            name for name, key in zip(names, keys, strict=True) if not store.check([key])
        ]:
            if time.monotonic() - began > (_GRACE if len(silent) == 1 else _PATIENT_GRACE):
                break
            time.sleep(0.1)
        causes = [store.get(key).decode() for key in keys if store.check([key])]
        if rank == 0:
            time.sleep(_GRACE)  # this process may host the store, which others still read
    except RuntimeError:
        silent, causes = names[:1], []
    if not in_collective:
        return None
    lost = f"{silent[0]} was lost" if len(silent) == 1 else f"one of {', '.join(silent)} was lost"
    return next(filter(None, causes), lost if silent else str(error))


def data_parallel(
    model: nn.Module, ranks: Ranks, *, compile: bool = False
) -> tuple[nn.Module, Callable[[], AbstractContextManager]]:
    """A model, compiled if asked for, whose gradients are averaged over the ranks, and a context
    without averaging."""
    trained = model
    no_sync: Callable[[], AbstractContextManager] = contextlib.nullcontext
    if ranks.world_size > 1:
        trained = parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        no_sync = parallel.no_sync
    if compile:  # after DDP, so that communication overlaps the backward pass
        trained = torch.compile(trained)  # type: ignore[assignment]
    return trained, no_sync


def _warn_of_an_idle_gpu() -> None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _DRIVER.exists() and not hidden:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA at all"
        print(
            f"warning: this machine has an NVIDIA GPU that torch {torch.__version__} can't use; "
            f"computing on the CPU. Compare `nvidia-smi` with what torch was built for ({built}), "
            "check that the container has access to the GPU, or give --device cpu",
            file=sys.stderr,
        )


def allow_tf32() -> None:
    """Let this process round the operands of float32 products to TF32 on a GPU that has it."""
    torch.backends.cuda.matmul.allow_tf32 = True
