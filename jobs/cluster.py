"""Which Ray a job runs on, and what its tasks raise."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from typing import Any

import ray

from famt.pipeline import storage
from famt.pipeline.errors import CacheFullError

_LOCAL = "give RAY_ADDRESS=local to use this machine alone"


def start_ray(*, log_to_driver: bool = False, **options: Any) -> None:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine for this program.

    `ray.init` alone joins any Ray that runs on the machine, whoever started it. Ray sets the
    variable for what `ray job submit` runs; `auto` stands for the one on this machine.

    Ray starts workers at niceness 15. Beside a training whose threads hold every core, such an
    actor took minutes to come up, longer than the run had left.

    Args:
        log_to_driver: show here what workers print.
        options: others of `ray.init`.

    Raises:
        ConnectionError: no cluster answers there.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_worker_niceness", "0")
    # What tasks raise after the first error that ended a job is no news either.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # That Ray guards what it starts here by a token is no news for whoever runs a command.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        print("starting Ray and its workers on this machine", file=sys.stderr, flush=True)
    try:
        if address not in ("local", "auto"):
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray tries for minutes
        ray.init(address, log_to_driver=log_to_driver, logging_level="warning", **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"no Ray cluster can be joined at RAY_ADDRESS={address} ({storage.reason(error)}); "
            f"start it, or {_LOCAL}"
        ) from error
    # Ray's own handler ends in an abort, with the native stack.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if address != "local":
        found = ray.get_runtime_context().gcs_address
        print(f"joined the Ray cluster {found} (RAY_ADDRESS={address})", file=sys.stderr)


def failure(error: ray.exceptions.RayTaskError) -> str:
    """What a task raised, in one line.

    Raises:
        CacheFullError: it is that; no other task could put anything either.
    """
    if isinstance(error.cause, CacheFullError):
        raise error.cause
    return f"{type(error.cause).__name__}: {storage.reason(error.cause)}"
