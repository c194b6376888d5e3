"""The Ray cluster of a job, and errors of its tasks."""

from __future__ import annotations

import logging
import os
import resource
import secrets
import signal
import socket
import sys
import threading
from typing import Any

import ray

from famt.pipeline import storage
from famt.pipeline.errors import CacheFullError


def start_ray(*, log_to_driver: bool = False, **options: Any) -> None:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine for this program.

    `ray.init` alone would join any Ray on the machine, whoever started it. `ray job submit` sets
    RAY_ADDRESS; `auto` means the Ray on this machine.

    Args:
        log_to_driver: show the output of workers.
        options: further options of `ray.init`.

    Raises:
        ConnectionError: no cluster answers at the address.
    """
    if ray.is_initialized():
        return
    # Ray's niceness of 15 leaves an actor waiting for minutes beside a training on all cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # After the error that ends a job, errors of its other tasks are noise.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Ray announces that it generated an authentication token.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        print("starting Ray and its workers on this machine", file=sys.stderr, flush=True)
        if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            # Each process maps the whole store, by default three tenths of the memory, or aborts.
            options["object_store_memory"] = min(limit // 8, 1 << 30)
        options["include_dashboard"] = False  # half of its processes
        if not os.access(os.path.expanduser("~"), os.W_OK):  # where Ray would keep a token
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        if address not in ("local", "auto"):
            host, _, port = address.rpartition("/")[2].rpartition(":")
            # Ray would try for minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=log_to_driver, logging_level="warning", **options)
    except Exception as error:  # Ray raises plain ones, too: its own start times out, say
        reason = storage.reason(error)
        if address == "local":
            raise ConnectionError(f"Ray does not start on this machine ({reason})") from error
        raise ConnectionError(
            f"no Ray cluster can be joined at RAY_ADDRESS={address} ({reason}); start it, or give "
            "RAY_ADDRESS=local to use this machine alone"
        ) from error
    # Ray's own handler aborts with a native stack trace.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if address != "local":
        found = ray.get_runtime_context().gcs_address
        print(f"joined the Ray cluster {found} (RAY_ADDRESS={address})", file=sys.stderr)


def failure(error: ray.exceptions.RayTaskError) -> str:
    """The error of a task in one line.

    Raises:
        CacheFullError: the error is one; no other task could write either.
    """
    if isinstance(error.cause, CacheFullError):
        raise error.cause
    return f"{type(error.cause).__name__}: {storage.reason(error.cause)}"
