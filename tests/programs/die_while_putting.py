"""Begin to put an object into a folder's store, and die: die_while_putting.py <folder> <path>"""

import os
import signal
import sys
from collections.abc import Iterator

import obstore
from obstore.store import LocalStore


def parts() -> Iterator[bytes]:
    yield bytes(6_000_000)
    yield bytes(6_000_000)
    os.kill(os.getpid(), signal.SIGKILL)


folder, path = sys.argv[1:]
obstore.put(LocalStore(folder), path, parts(), max_concurrency=1)
