"""Errors that a user can act on."""

from __future__ import annotations


class UserError(Exception):
    """Wrong input; the message names it and the remedy.

    Programs print it in one line. A `ValueError` is a defect, and keeps its traceback.
    """


class CacheError(RuntimeError):
    """The score cache lacks something, or is damaged; the message has the remedy."""


class CacheFullError(CacheError):
    """The cache's disk or its user's quota is full; all further writes would fail."""


class RankError(RuntimeError):
    """Another rank of a training failed or was lost."""
