"""What each worker of Ray Train runs, and which of its failures are retried."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from famt.pipeline import storage
from famt.train import pretrain
from famt.train.command_line import is_users
from famt.train.config import Pretrain
from famt.train.run_folder import BusyError


class MistakeError(Exception):
    """Wrong input, which no retry mends."""


def train(config: Pretrain) -> None:
    """Train in a worker.

    Raises:
        MistakeError: the input is wrong.
        BusyError: a lost worker still holds the lock on the run's folder; worth a retry.
    """
    try:
        pretrain.main(config)
    except BusyError:
        raise
    except Exception as error:
        if not is_users(error):
            raise
        raise MistakeError(storage.reason(error)) from None


class EndAtMistakes(UserCallback):
    """Ends a run at the first `MistakeError`.

    Ray Train retries every error of a worker, but none of a callback.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train after workers raised."""
        for error in worker_exceptions.values():
            raised = getattr(error, "_base_exc", error)  # Ray wraps it with its traceback
            if isinstance(raised, MistakeError):
                raise raised
