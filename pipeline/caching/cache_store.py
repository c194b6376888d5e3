"""The objects of a score cache: their names, checksums, and every call to the store.

See `famt.pipeline.caching.cache` for the names.
An object appears under its name whole or not at all. It ends in a checksum: BLAKE3 of the cache's
format, the object's path and its bytes. So truncation, a flipped bit or a swapped object is
detected. Files with other names are foreign, and nothing in this project deletes them.

A local writer fills `<name>#<number>` before it takes the name; a killed writer leaves that file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import obstore
from blake3 import blake3
from numpy.typing import NDArray

from famt.pipeline import storage
from famt.pipeline.caching import zarr_zip
from famt.pipeline.errors import CacheError, CacheFullError

TABLE = "table"

_FORMAT = 5  # up to 4 an entry was a folder of many objects
_SPEC_ID = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*-[0-9a-f]{12}"
# Folders of the root, and names of their children.
_CHILDREN = {"shards": r"[0-9a-f]{32}", "datasets": r"[A-Za-z0-9_-]+-[0-9a-f]{12}"}
_NAME = (
    rf"shards/{_CHILDREN['shards']}/({TABLE}|{_SPEC_ID})\.zip"
    rf"|datasets/{_CHILDREN['datasets']}/[0-9]{{8}}\.json"
)
_OBJECT, _STAGING = re.compile(_NAME), re.compile(rf"({_NAME})#[0-9]+")
_DIGITS = 32  # of a checksum
_BLANK = "0" * _DIGITS
_AFTER_JSON = len('"\n}')  # follows the checksum in JSON; a zip ends with the checksum


@dataclass(frozen=True)
class Stored:
    """A listed object: its path in the cache, its size in bytes, and when it was put."""

    path: str
    bytes: int
    modified: datetime


def is_spec_id(name: str) -> bool:
    """Whether a name is well-formed as that of stored maps."""
    return re.fullmatch(_SPEC_ID, name) is not None


class CacheStore:
    """Objects below a folder or object-store URL; arguments and errors as of `open_store`."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = storage.normalise_url(url)
        self._store = storage.open_store(self.url, create=create)

    def get_json(self, path: str) -> dict[str, Any]:
        """The content of a JSON object.

        Raises:
            FileNotFoundError: there is none.
            CacheError: it is damaged.
        """
        return json.loads(self._get(path))

    def put_json(self, path: str, content: dict[str, Any]) -> None:
        """Put a new JSON object; errors as of `put`, and AlreadyExistsError."""
        data = json.dumps({**content, "checksum": _BLANK}, indent=1).encode()
        self.put(path, _sealed(path, data), "create")

    def get_group(self, path: str) -> zarr_zip.Group:
        """A zarr group; errors as of `get_json`."""
        return zarr_zip.Group(self._get(path))

    def put_group(self, path: str, attributes: dict[str, Any], arrays: dict[str, NDArray]) -> None:
        """Put a zarr group; errors as of `put`."""
        self.put(path, _sealed(path, zarr_zip.pack(attributes, arrays, _BLANK.encode())))

    def _get(self, path: str) -> bytes:
        data = self.get(path)
        if data != _sealed(path, data):
            raise CacheError(
                f"{self.url}/{path} is damaged (its checksum is wrong: it was changed, is another "
                f"object, or another version of FAMT made this cache). {remedy(self.url, path)}"
            )
        return data

    def get(self, path: str) -> bytes:
        """All bytes of an object, unchecked; FileNotFoundError if there is none."""
        if storage.is_remote(self.url):
            return bytes(obstore.get(self._store, path).bytes())
        return Path(self.url, path).read_bytes()  # a third of obstore's time

    def put(
        self, path: str, data: bytes, mode: Literal["create", "overwrite"] = "overwrite"
    ) -> None:
        """Put sealed bytes; errors as of `storage.put`.

        Raises:
            ValueError: not a name of a cache's object.
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
        """Whether the object exists."""
        if not storage.is_remote(self.url):
            return os.path.exists(f"{self.url}/{path}")
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def below(self, folder: str) -> Iterator[Stored]:
        """Objects of the cache anywhere below a folder, without foreign files."""
        for part in obstore.list(self._store, folder, chunk_size=1000):
            for meta in part:
                if _OBJECT.fullmatch(meta["path"]):
                    yield Stored(meta["path"], meta["size"], meta["last_modified"])

    def refuse_foreign(self) -> None:
        """Raise a CacheError that names the first foreign file in the root's folders."""
        for folder, pattern in _CHILDREN.items():
            for name in self._names(folder):
                if re.fullmatch(pattern, name) is None:
                    raise CacheError(
                        f"{self.url}/{folder}/{name} is no part of a score cache, and "
                        f"{self.url}/{folder} must hold nothing else: give another folder as "
                        "--cache, or move that away"
                    )

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects or staging files, for `gc` and for old versions of a manifest; a
        ValueError, and nothing deleted, if a name is foreign."""
        paths = list(paths)
        for path in paths:
            if not (_OBJECT.fullmatch(path) or _STAGING.fullmatch(path)):
                raise ValueError(f"{path} is no object of a score cache: not deleted")
        if storage.is_remote(self.url):
            obstore.delete(self._store, paths)
            return
        for path in paths:
            Path(self.url, path).unlink(missing_ok=True)  # someone else may be faster

    def staging_files(self) -> Iterator[Stored]:
        """Partial files of killed local writers, `<name>#<number>`; obstore does not list them."""
        # An object store has none.
        for file in [] if storage.is_remote(self.url) else Path(self.url).glob("*/*/*#*"):
            path = file.relative_to(self.url).as_posix()
            if _STAGING.fullmatch(path) and not file.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # its writer has just renamed it
                    info = file.stat()
                    modified = datetime.fromtimestamp(info.st_mtime, UTC)
                    yield Stored(path, info.st_size, modified)

    def _names(self, folder: str) -> list[str]:
        """All names right in a folder of the root; none if there is no such folder."""
        if not storage.is_remote(self.url):
            try:
                return os.listdir(Path(self.url, folder))
            except FileNotFoundError:
                return []
        listing = obstore.list_with_delimiter(self._store, folder)
        paths = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
        return [path.removeprefix(f"{folder}/") for path in paths]


def remedy(url: str, path: str) -> str:
    """How to repair a damaged object: remove what it belongs to, and run the job again."""
    if path.startswith("datasets/"):
        return (
            "Remove it and run `famt score` over its folder again: shards are hashed anew, "
            "scores are not"
        )
    if path.endswith(f"/{TABLE}.zip"):  # maps go by its rows
        return f"Remove {url}/{path.rpartition('/')[0]} and run `famt score` again"
    return f"Remove {url}/{path} and run `famt score` again"


def _sealed(path: str, data: bytes) -> bytes:
    """The bytes of an object, with its checksum in place of the one there."""
    end = len(data) - (_AFTER_JSON if path.endswith(".json") else 0)
    head, tail = data[: max(0, end - _DIGITS)], data[max(0, end) :]
    digest = blake3(f"{_FORMAT} {path} ".encode())
    digest.update(head).update(tail)
    return head + digest.hexdigest(length=_DIGITS // 2).encode() + tail
