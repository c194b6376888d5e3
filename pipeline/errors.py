"""Errors that a user can act on."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input; the message says what is wrong with it, and what to do.

    Programs show it in one line. Any other `ValueError` is a defect, and shows its traceback.
    """


class CacheError(RuntimeError):
    """The score cache lacks what was asked of it, or it is damaged; the message has the remedy."""


class CacheFullError(CacheError):
    """The cache's disk has no room left, or its user no quota; nothing else will succeed."""


class RankError(RuntimeError):
    """Another rank of a training failed or was lost, and this one can't go on without it."""
