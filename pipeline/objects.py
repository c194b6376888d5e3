"""The objects of a score cache: the one class that calls its store, and the names they may have.

Every object of a cache has one of these names; what has another is not the cache's, and nothing in
this project deletes it:

    shards/<shard id>/zarr.json, <array>/zarr.json and <array>/c/0/0...
                                          <array>: samples, key, or the id of a score
    datasets/<folder>-<hash>/<version>.json
    generations/<run>/<step>.json, generations/<run>/needed-by-<run>
    packs/<pack id>/zarr.json, <array>/zarr.json and <array>/c/<n>/0...
                                          <array>: samples or maps
    notices/<id>.json, claims/<id>.json

A local writer fills `<name>#<number>` before it takes the name; a killed one leaves that behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import obstore
from zarr.storage import ObjectStore as ZarrStore

from famt.pipeline import storage
from famt.pipeline.sealed import CacheError, CacheFullError

_SHARD_ID = r"[0-9a-f]{32}"
_SPEC_ID = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*-[0-9a-f]{12}"
_RUN = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
# Folders of the root, with what may lie right in them.
_CHILDREN = {
    "shards": _SHARD_ID,
    "datasets": r"[A-Za-z0-9_-]+-[0-9a-f]{12}",
    "generations": _RUN,
    "packs": r"[0-9a-f]{32}",
    "notices": r"[0-9a-f]{32}\.json(#\d+)?",
    "claims": r"[0-9a-f]{32}\.json(#\d+)?",
}
_OBJECT = re.compile(
    rf"shards/{_SHARD_ID}/(zarr\.json|(samples|key|{_SPEC_ID})/(zarr\.json|c(/0){{1,3}}))"
    rf"|datasets/{_CHILDREN['datasets']}/\d{{8}}\.json"
    rf"|generations/{_RUN}/(\d{{8,}}\.json|needed-by-{_RUN})"
    rf"|packs/{_CHILDREN['packs']}/(zarr\.json|(samples|maps)/(zarr\.json|c/\d+(/0){{1,2}}))"
    rf"|(notices|claims)/[0-9a-f]{{32}}\.json"
)


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it: its path in the cache, bytes, and when it was put."""

    path: str
    bytes: int
    modified: datetime


def is_shard_id(name: str) -> bool:
    """Whether a name can be a shard's."""
    return re.fullmatch(_SHARD_ID, name) is not None


def is_spec_id(name: str) -> bool:
    """Whether a name can be that of stored maps."""
    return re.fullmatch(_SPEC_ID, name) is not None


def is_run(name: str) -> bool:
    """Whether a name can be that of a training run."""
    return re.fullmatch(_RUN, name) is not None


class Objects:
    """Objects below the folder or object-store URL `url`; a local one is made if `create`.

    Raises:
        FileNotFoundError: a local folder that is not there, without `create`.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = storage.normalise_url(url)
        self._store = storage.open_store(self.url, create=create)

    def zarr(self) -> ZarrStore:
        """The same objects as zarr reads them."""
        return ZarrStore(self._store, read_only=True)

    def get(self, path: str) -> bytes:
        """All bytes of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        return bytes(obstore.get(self._store, path).bytes())

    async def get_async(self, path: str) -> bytes:
        """`get` for a caller that reads many at once."""
        return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

    def put(
        self, path: str, data: bytes, mode: Literal["create", "overwrite"] = "overwrite"
    ) -> None:
        """Put an object whole; see `storage.put`.

        Raises:
            ValueError: a name that the cache itself could not tell from a foreign one.
            CacheFullError: no room is left.
        """
        if _OBJECT.fullmatch(path) is None:
            raise ValueError(f"{path} is no name for an object of a score cache")
        try:
            storage.put(self._store, path, data, mode)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CacheFullError(
                f"the score cache {self.url} is full ({os.strerror(error.errno)}): make room there "
                f"(`famt cache gc --cache {self.url}` removes what nothing needs) or use "
                "another cache, and run this again; nothing is scored twice"
            ) from error

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def below(self, folder: str) -> Iterator[Stored]:
        """Objects of the cache anywhere below a folder; foreign ones are left out."""
        for part in obstore.list(self._store, folder):
            for meta in part:
                if _OBJECT.fullmatch(meta["path"]):
                    yield Stored(meta["path"], meta["size"], meta["last_modified"])

    def children(self, folder: str) -> list[str]:
        """Names right in one of the root's folders that can be the cache's, sorted."""
        return sorted(name for name in self._names(folder) if re.fullmatch(_CHILDREN[folder], name))

    def refuse_foreign(self) -> None:
        """Make sure that the root's folders hold nothing but the cache's own.

        Raises:
            CacheError: they do; a cache there might be taken for the owner of other files.
        """
        for folder, pattern in _CHILDREN.items():
            for name in self._names(folder):
                if re.fullmatch(pattern, name) is None:
                    raise CacheError(
                        f"{self.url}/{folder}/{name} is no part of a score cache, and "
                        f"{self.url}/{folder} must hold nothing else: give another folder as "
                        "--cache, or move that away"
                    )

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; for the collector, notices and claims, old versions of a manifest.

        Raises:
            ValueError: a name that can't be the cache's.
        """
        paths = list(paths)
        for path in paths:
            if _OBJECT.fullmatch(path) is None:
                raise ValueError(f"{path} is no object of a score cache: not deleted")
        if storage.is_remote(self.url):
            obstore.delete(self._store, paths)
            return
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # someone else was faster
                obstore.delete(self._store, path)

    def staging_files(self) -> Iterator[Stored]:
        """What killed local writers left behind; an object store has none.

        obstore names them `<name>#<number>`, and neither lists nor deletes them.
        """
        for folder in [] if storage.is_remote(self.url) else _CHILDREN:
            for place, _, names in os.walk(Path(self.url, folder)):
                for name in names:
                    file = Path(place, name)
                    path = file.relative_to(self.url).as_posix()
                    final = re.sub(r"#\d+$", "", path)
                    if final != path and _OBJECT.fullmatch(final) and not file.is_symlink():
                        try:
                            info = file.stat()
                        except FileNotFoundError:  # its writer took the name
                            continue
                        modified = datetime.fromtimestamp(info.st_mtime, UTC)
                        yield Stored(path, info.st_size, modified)

    def delete_staging(self, file: Stored) -> None:
        """Delete one of `staging_files`."""
        Path(self.url, file.path).unlink(missing_ok=True)

    def _names(self, folder: str) -> list[str]:
        """All names right in a folder of the root, files and folders; none if it is not there."""
        if not storage.is_remote(self.url):
            try:
                return os.listdir(Path(self.url, folder))
            except FileNotFoundError:
                return []
        listing = obstore.list_with_delimiter(self._store, folder)
        paths = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
        return [path.removeprefix(f"{folder}/") for path in paths]
