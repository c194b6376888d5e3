"""What the operating system allows a process."""

from __future__ import annotations

import os
import resource

_OTHERS = 256  # libraries, sockets, logs


def allow_open_files(count: int) -> None:
    """Let this process open `count` files more than it has open now.

    Raises:
        OSError: it may not; says by which means it could.
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
