"""What this process may use of its machine: open files, CPU cores and memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_OTHERS = 256  # libraries, sockets, logs


def own_cores() -> int:
    """This rank's share of the machine's CPU cores."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def free_memory() -> int:
    """Bytes of memory that programs can have, the page cache of files included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(kib)


def allow_open_files(count: int) -> None:
    """Raise the limit so that this process can open `count` more files.

    Raises:
        OSError: the limit can't be raised; the message has the commands that would.
    """
    wanted = len(os.listdir("/proc/self/fd")) + count + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY:
        hard = max(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        raise OSError(
            f"reading keeps {count} tars open, and this process may open no more than {soft} "
            f"files: allow it {wanted} (`ulimit -n {wanted}`; LimitNOFILE of systemd; docker run "
            f"--ulimit nofile={wanted}), or make larger shards"
        ) from error
