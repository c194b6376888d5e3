"""How writers and a collection that deletes keep out of each other's way, without locks.

A writer relies on what it finds: scores that another job left, which no manifest names yet, and a
collection may be about to delete just those. Both sides say what they do before they look at what
the other does, so at least one of them sees the other, whatever the order of their steps:

    writer:     put a claim -> wait until no notice speaks of it -> look what is there, put what is
                not -> publish a record or a generation, which names it -> delete the claim
    collection: put a notice of what will go -> read claims, then manifests and generations ->
                delete what still nothing names -> delete the notice

A run that needs a generation does as a writer: its list of needed ones is the claim.

Stores list what was put at once (S3 has been so since 2020). A collection deletes only within
`WORKS` seconds of its notice; a notice that is still there after `DEAD` seconds of waiting is a
killed collection's, and whoever waited removes it. Both are spans on one machine's own clock. A
claim holds for `HOLDS`, by the store's clock and the collection's; what takes longer renews it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from famt.pipeline import storage
from famt.pipeline.objects import Objects
from famt.pipeline.sealed import damaged, seal, unseal

WORKS = 60.0
DEAD = 180.0
HOLDS = timedelta(days=1)
_POLL = 0.1
_NO_GC, _NO_JOB = "Remove it when no gc is running.", "Remove it when no job is running."


@dataclass(frozen=True)
class Claimed:
    """What writers are at work on: ids of shards, and of specs of which they add maps anywhere."""

    shards: set[str]
    specs: set[str]


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
        self._objects.put(path, seal({"paths": sorted(paths)}, path))
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
        going = _content(self._objects, notice, data, _NO_GC, "paths")["paths"]
        return any(not paths.isdisjoint(_with_parents(path)) for path in going)


class Claims:
    """The claims of the cache in `objects`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def claim(self, *, shards: Iterable[str] = (), specs: Iterable[str] = ()) -> str:
        """Keep entries of shards, or maps of specs in all entries, from being collected.

        When this returns no collection is at work on the shards, and none will be until `release`.

        Returns:
            the claim, for `release`.
        """
        path = f"claims/{uuid.uuid4().hex}.json"
        shards, specs = sorted(shards), sorted(specs)
        self._put(path, shards, specs)
        notices = Notices(self._objects)
        # Maps of a spec may lie in any entry.
        notices.wait({"shards"} if specs else {f"shards/{shard_id}" for shard_id in shards})
        return path

    @contextmanager
    def claimed(self, specs: Iterable[str]) -> Iterator[None]:
        """Claim maps of specs for as long as the block runs, be it days: a thread renews the claim.

        It can't while the store is out of reach. So who publishes after that looks again.
        """
        specs, over = sorted(specs), threading.Event()
        path = self.claim(specs=specs)

        def renew() -> None:
            while not over.wait(HOLDS.total_seconds() / 24):
                with contextlib.suppress(*storage.UNREACHABLE):
                    self._put(path, [], specs)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.release([path])

    def _put(self, path: str, shards: list[str], specs: list[str]) -> None:
        self._objects.put(path, seal({"shards": shards, "specs": specs}, path))

    def release(self, claims: Iterable[str]) -> None:
        """Give up claims: what they spoke of has a name now, or is not wanted any more."""
        self._objects.delete(claims)

    def held(self) -> Claimed:
        """What is claimed now."""
        shards: set[str] = set()
        specs: set[str] = set()
        for each in self._objects.below("claims"):
            if datetime.now(UTC) - each.modified > HOLDS:
                continue
            try:
                data = self._objects.get(each.path)
            except FileNotFoundError:  # released
                continue
            content = _content(self._objects, each.path, data, _NO_JOB, "shards", "specs")
            shards.update(content["shards"])
            specs.update(content["specs"])
        return Claimed(shards, specs)

    def outdated(self) -> list[str]:
        """Claims of writers that were killed."""
        now = datetime.now(UTC)
        return [each.path for each in self._objects.below("claims") if now - each.modified > HOLDS]


def _content(
    objects: Objects, path: str, data: bytes, remedy: str, *lists: str
) -> dict[str, list[str]]:
    content = unseal(data, objects.url, path, remedy)
    if not all(isinstance(content.get(name), list) for name in lists):
        raise damaged(f"{objects.url}/{path}", f"it lacks {' or '.join(lists)}", remedy)
    return content


def _with_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
