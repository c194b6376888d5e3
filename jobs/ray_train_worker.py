"""What each worker of Ray Train runs, and which of its failures are retried."""

from __future__ import annotations

import errno
from typing import Any

from obstore.exceptions import GenericError
from ray.train import UserCallback, get_context

from famt.pipeline import storage
from famt.train import pretrain
from famt.train.command_line import is_users
from famt.train.config import Pretrain
from famt.train.distributed import SEEN_WITHIN
from famt.train.run_folder import BusyError, await_folder

_PASSING = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


class MistakeError(Exception):
    """Wrong input, which no retry mends."""


def train(config: Pretrain) -> None:
    """Train in a worker.

    Raises:
        MistakeError: the input is wrong.
        BusyError: a lost worker still holds the lock on the run's folder; worth a retry.
        OSError: a disk or a store failed; worth a retry.
    """
    if get_context().get_world_rank() == 0:
        await_folder(config.out, SEEN_WITHIN)
    try:
        pretrain.main(config)
    except Exception as error:
        if not is_mistake(error):
            raise
        raise MistakeError(storage.reason(error)) from None


def is_mistake(error: Exception) -> bool:
    """Whether an error is wrong input; a lock that is held, or a disk or store that fails, may
    pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (BusyError, GenericError)) or getattr(cause, "errno", 0) in _PASSING:
            return False
        cause = cause.__cause__
    return is_users(error)


def raised(error: Exception) -> Exception:
    """What a worker raised, which Ray wraps with its traceback."""
    return getattr(error, "_base_exc", error)


class EndAtMistakes(UserCallback):
    """Ends a run at the first `MistakeError`.

    Ray Train retries every error of a worker, but none of a callback.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train after workers raised."""
        for error in worker_exceptions.values():
            if isinstance(mistake := raised(error), MistakeError):
                raise mistake
