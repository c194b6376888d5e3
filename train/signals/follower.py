"""The refresh job that follows a run, as the run sees it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from famt.pipeline.errors import UserError
from famt.train.log import Log
from famt.train.signals.refresh_folder import RefreshFolder

_POLL = 0.2  # seconds
_PATIENCE = 60.0  # seconds that a job may take to start


class Follower:
    """The job that makes a run's generations.

    Args:
        out: folder of the run.
        needed: wait for the job to start.

    Attributes:
        command: that starts it.
        is_there: whether it followed the run when last checked.

    Raises:
        UserError: no job started, though one is needed.
    """

    def __init__(self, out: Path, *, needed: bool) -> None:
        self.command = f"famt refresh --follow {out}"
        self._folder = RefreshFolder(out)
        until = time.monotonic() + _PATIENCE
        self.is_there = self._folder.is_followed()
        if needed and not self.is_there:
            print(f"waiting for a refresh job: start `{self.command}`", file=sys.stderr, flush=True)
        while needed and not self.is_there:
            if time.monotonic() > until:
                raise UserError(
                    f"--refresh.wait: no refresh job follows {out}. `famt pretrain` starts one; "
                    f"otherwise start `{self.command}` first"
                )
            time.sleep(_POLL)
            self.is_there = self._folder.is_followed()

    def report_end(self, step: int, log: Log) -> None:
        """Log, once, that the job ended."""
        if self.is_there and not self._folder.is_followed():
            self.is_there = False
            log.event(step, "refresh job ended", tell=True, to_start_one=self.command)

    def report(self, step: int, log: Log) -> None:
        """Log that the job ended, and which generations it could not make."""
        self.report_end(step, log)
        for each in self._folder.encoders():
            if reason := self._folder.why_failed(each):
                self._folder.failure(each).unlink(missing_ok=True)
                log.event(step, "refresh failed", tell=True, reason=reason)
