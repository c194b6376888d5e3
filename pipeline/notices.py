"""How writers and a collection that deletes keep out of each other's way, without locks.

A writer may rely on an object that a collection is just about to delete: scores that another job
left, which no manifest names yet. Both sides say what they do before they look at what the other
does, so at least one of them sees the other, whatever the order of their steps:

    collection: put a notice of what will go -> read manifests and generations -> delete what still
                nothing names -> delete the notice
    writer:     put what names the objects -> wait until no notice speaks of them -> see that they
                are all there; make those anew that are not

Stores list what was put at once (S3 has been so since 2020). A collection deletes only within
`WORKS` seconds of its notice; a notice that is still there after `DEAD` seconds of waiting is a
killed collection's, and whoever waited removes it. Both are spans on one machine's own clock.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager

from pipeline.objects import Objects
from pipeline.sealed import seal, unseal

WORKS = 60.0
DEAD = 180.0
_POLL = 0.1


class Notices:
    """The notices of the cache in `objects`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    @contextmanager
    def posted(self, paths: Collection[str]) -> Iterator[Callable[[], bool]]:
        """Say that objects or folders of objects will go, while the block runs.

        Yields:
            whether there still is time to delete.
        """
        path = f"notices/{uuid.uuid4().hex}.json"
        began = time.monotonic()  # before others can see it
        self._objects.put(path, seal({"paths": sorted(paths)}))
        try:
            yield lambda: time.monotonic() - began < WORKS
        finally:
            self._objects.delete([path])

    def wait(self, paths: Set[str], *, patience: float = DEAD) -> None:
        """Return when nothing that is about to be deleted is, or lies in, one of `paths`."""
        first_seen: dict[str, float] = {}
        while at_work := [path for path in self._all() if self._concerns(path, paths)]:
            now = time.monotonic()
            for path in at_work:
                if now - first_seen.setdefault(path, now) > patience:
                    self._objects.delete([path])
            time.sleep(_POLL)

    def _all(self) -> list[str]:
        return [notice.path for notice in self._objects.below("notices")]

    def _concerns(self, notice: str, paths: Set[str]) -> bool:
        try:
            data = self._objects.get(notice)
        except FileNotFoundError:  # done
            return False
        where = f"{self._objects.url}/{notice}"
        going = unseal(data, where, "Remove it when no gc is running.")["paths"]
        return any(not paths.isdisjoint(_with_parents(path)) for path in going)


def _with_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 1, -1)]
