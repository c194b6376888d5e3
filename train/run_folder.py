"""The folder of a run: a lock that keeps others out, and files never seen half written."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from famt.pipeline.errors import UserError
from famt.pipeline.storage import reason


class BusyError(UserError):
    """Another process trains in a run's folder; it may be about to end."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file atomically, as `<path>.partial`: others see the old content, or the new one,
    complete and on disk.

    Raises:
        OSError: writing failed, for example on a full disk; the old content stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        room = shutil.disk_usage(path.parent).free
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path}: could not be written, the old content stays; {room / 1e6:.0f} MB were free "
            f"({reason(error)})"
        ) from error


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path for a file or folder that gets the name `out` once it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
    yield partial
    partial.rename(out)


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Create a run's folder and lock it against other processes.

    Removes what a killed run left half written, and at the end a folder that stayed empty.

    Raises:
        UserError: another process trains in it (`BusyError`), or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {folder} is a file; give a folder") from None
    with open(folder / "lock", "a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise BusyError(
                f"{folder} is in use by {held.read().strip() or 'another run'}; wait for it, or "
                "give another --out"
            ) from None
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        held.flush()
        for place in (folder, folder / "refresh"):
            for partial in place.glob("*.partial"):  # of a writer that was killed
                partial.unlink()
        try:
            yield
        finally:
            if os.listdir(folder) == ["lock"]:  # the run failed before it started
                (folder / "lock").unlink()
                folder.rmdir()


def await_folder(folder: Path, seconds: float) -> None:
    """Wait until no other process trains in a run's folder, such as that of a lost machine, whose
    lock a network file system keeps for a while; at most some seconds."""
    until = time.monotonic() + seconds
    while folder.exists() and time.monotonic() < until:
        try:
            with own_folder(folder):
                return
        except BusyError:
            time.sleep(1)
        except (UserError, OSError):  # whoever trains there will tell
            return
