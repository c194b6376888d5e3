"""The folder of a run: whose it is, and files in it that appear only when they are whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
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
    """Write a file that other processes see as it was before, or complete and on disk.

    Args:
        path: of the file. Until it is complete it is `<path>.partial`.

    Raises:
        OSError: it could not be written, the disk is full, say; what was there stands.
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
            f"{path}: could not be written, what was there stands; {room / 1e6:.0f} MB were free "
            f"({reason(error)})"
        ) from error


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other processes from training in it meanwhile.

    What a killed run left half written in it is removed, and so is a folder in which nothing came
    to be.

    Raises:
        ValueError: another process trains in it (`BusyError`), or it is a file.
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
            if os.listdir(folder) == ["lock"]:  # it failed before it began
                (folder / "lock").unlink()
                folder.rmdir()
