"""Files of a run that appear under their names only when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from famt.pipeline.storage import reason


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
