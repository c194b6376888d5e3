"""Which failures of a training under Ray Train are worth another try."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from famt.pipeline import storage
from famt.train import pretrain
from famt.train.config import Pretrain
from famt.train.files import BusyError
from famt.train.program import is_users


class MistakeError(Exception):
    """Wrong input, which another try would find as wrong."""


def train(config: Pretrain) -> None:
    """Train in a worker.

    Raises:
        MistakeError: the input is wrong; says what and what to do.
        BusyError: a lost worker's lock on the run's folder is still there.
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
    """Ends a run at the first `MistakeError`; Ray Train alone would try it again.

    An error in a callback is the one failure of a run that Ray Train never tries again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this when workers raised."""
        for error in worker_exceptions.values():
            raised = getattr(error, "_base_exc", error)  # which Ray wraps with its traceback
            if isinstance(raised, MistakeError):
                raise raised
