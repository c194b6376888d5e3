"""Words of messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A count and its noun: "1 class", "20 classes"."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
