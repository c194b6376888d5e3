"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar of tqdm with these options, drawn every second, or every ten in a file, which keeps
    each drawing."""
    return tqdm(iterable, mininterval=1 if sys.stderr.isatty() else 10, **options)
