"""What a run and the job that refreshes its scores leave for each other, in the run's folder.

    <out>/refresh/encoder-<step>.pt       an encoder that a generation is due of
    <out>/refresh/encoder-<step>.failed   why the job could not make it
    <out>/refresh/finished                no encoder will follow
    <out>/refresh/followed                locked by a job as long as it follows the run

Which epoch began with which generation stands in `famt.train.signals.record`'s file.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from famt.train.files import written_whole


def encoder_path(out: Path, step: int) -> Path:
    """Where a run leaves the encoder of a step, for a generation to be made of it."""
    return out / "refresh" / f"encoder-{step:08d}.pt"


def due_encoders(out: Path) -> list[Path]:
    """Encoders that a run has left and not removed yet, the oldest first."""
    return sorted((out / "refresh").glob("encoder-*.pt"))


def failed_path(encoder: Path) -> Path:
    """Where the job writes why it could not make a generation of an encoder."""
    return encoder.with_suffix(".failed")


def write_failure(encoder: Path, why: str) -> None:
    """Tell the run why no generation could be made of an encoder."""
    with written_whole(failed_path(encoder)) as file:
        file.write(f"{why}\n".encode())


@contextmanager
def followed(out: Path) -> Iterator[int]:
    """Show a run that a job follows it, for as long as this context is open.

    Yields:
        a descriptor; a process that inherits it shows the same as long as it lives.
    """
    path = _followed_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # several jobs may follow one run
        yield held.fileno()


def is_followed(out: Path) -> bool:
    """Whether a job follows a run; the kernel forgets one that was killed."""
    try:
        with open(_followed_path(out), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _followed_path(out: Path) -> Path:
    return out / "refresh" / "followed"


def finished_path(out: Path) -> Path:
    """What a run leaves when no encoder will follow."""
    return out / "refresh" / "finished"


def write_finished(out: Path) -> None:
    """Tell the job that no encoder will follow."""
    finished_path(out).parent.mkdir(parents=True, exist_ok=True)
    finished_path(out).touch()


def remove_encoders(out: Path, up_to: int | None = None) -> None:
    """Remove those that no generation is wanted of any more: up to a step, or all."""
    for path in due_encoders(out):
        if up_to is None or path <= encoder_path(out, up_to):
            path.unlink(missing_ok=True)
            failed_path(path).unlink(missing_ok=True)
