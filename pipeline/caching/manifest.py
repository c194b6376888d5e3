"""Manifests: which shard of which folder has which entry in the score cache.

Each folder of shards has one manifest, a versioned object. A version is put only if its number is
free, so any number of jobs may publish at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from obstore.exceptions import AlreadyExistsError

from famt.pipeline import storage
from famt.pipeline.caching.cache_store import CacheStore
from famt.pipeline.storage import Version

_KEEP_VERSIONS = 3


@dataclass(frozen=True)
class ShardRecord:
    """The state of a shard's file when it was read, and the id of its content."""

    version: Version
    shard_id: str


@dataclass(frozen=True)
class _Manifest:
    version: int
    folder: str
    records: dict[str, ShardRecord]


class Manifests:
    """The manifests of a cache."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store

    def read(self, folder: str) -> dict[str, ShardRecord]:
        """Records of the shards in a folder, by file name; a CacheError if they are damaged."""
        return self._newest(_prefix(folder)).records

    def publish(self, records: Mapping[str, ShardRecord]) -> None:
        """Add records (URL -> record) to their folders' manifests, atomically for each folder."""
        folders: dict[str, dict[str, ShardRecord]] = {}
        for url, record in records.items():
            folder, name = storage.split_url(url)
            folders.setdefault(folder, {})[name] = record
        for folder, new in folders.items():
            self._change(folder, new, {})

    def forget(self, folder: str, records: Mapping[str, ShardRecord]) -> None:
        """Drop records (file name -> record) from a folder's manifest, atomically.

        A record that was published anew meanwhile, and so differs, stays.
        """
        self._change(folder, {}, records)

    def lookup(self, urls: Iterable[str]) -> dict[str, ShardRecord]:
        """Records of those URLs that have one, whether or not the files have changed."""
        manifests: dict[str, dict[str, ShardRecord]] = {}
        found = {}
        for url in urls:
            folder, name = storage.split_url(url)
            if folder not in manifests:
                manifests[folder] = self.read(folder)
            if name in manifests[folder]:
                found[url] = manifests[folder][name]
        return found

    def path(self, folder: str) -> str:
        """Where in the cache the manifest of a folder lies."""
        return _prefix(folder)

    def folders(self) -> dict[str, dict[str, ShardRecord]]:
        """Records of every known folder of shards; errors as of `read`."""
        found = {}
        for prefix in {each.path.rpartition("/")[0] for each in self._store.below("datasets")}:
            manifest = self._newest(prefix)
            if manifest.version:
                found[manifest.folder] = manifest.records
        return found

    def _change(
        self, folder: str, new: Mapping[str, ShardRecord], gone: Mapping[str, ShardRecord]
    ) -> None:
        """Put new versions until the newest has these changes, whoever else publishes."""
        prefix = _prefix(folder)
        while True:
            old = self._newest(prefix)
            stay = {name: each for name, each in old.records.items() if gone.get(name) != each}
            merged = {**stay, **new}
            if merged == old.records:
                return
            shards = {
                name: {"size": each.version.size, "stamp": each.version.stamp, "id": each.shard_id}
                for name, each in sorted(merged.items())
            }
            path = _path(prefix, old.version + 1)
            try:
                self._store.put_json(path, {"folder": folder, "shards": shards})
            except AlreadyExistsError:
                continue
            versions = self._versions(prefix)
            self._store.delete(_path(prefix, outdated) for outdated in versions[:-_KEEP_VERSIONS])
            # While this publisher was slow, others may have used the same number and deleted it
            # again. Newer versions then lack these changes.
            if versions[-1] == old.version + 1:
                return

    def _newest(self, prefix: str) -> _Manifest:
        """The newest version of a manifest, or an empty version 0."""
        while versions := self._versions(prefix):
            path = _path(prefix, versions[-1])
            try:
                content = self._store.get_json(path)
            except FileNotFoundError:
                continue  # cleared away since it was listed
            records = {
                name: ShardRecord(Version(entry["size"], entry["stamp"]), entry["id"])
                for name, entry in content["shards"].items()
            }
            return _Manifest(versions[-1], content["folder"], records)
        return _Manifest(0, "", {})

    def _versions(self, prefix: str) -> list[int]:
        return sorted(int(each.path[-13:-5]) for each in self._store.below(prefix))


def _prefix(folder: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.rpartition("/")[2]) or "root"
    return f"datasets/{readable}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"


def _path(prefix: str, version: int) -> str:
    return f"{prefix}/{version:08d}.json"
