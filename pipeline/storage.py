"""Files in local folders and in object stores (s3, gs, az), by path or URL.

Object stores take their settings from the environment, as obstore and DALI both do:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

_THREADS = 32
_A = TypeVar("_A")
_B = TypeVar("_B")

UNREACHABLE = (OSError, BaseError)
"""errors of a disk or an object store that can't be read or written now"""


@dataclass(frozen=True)
class Version:
    """The state of a file, to compare without reading it.

    Attributes:
        size: bytes.
        stamp: an object's etag; of a local file the modification and the change time, ns. No
            program can set the change time, so a replaced file of equal size and modification time
            is noticed.
    """

    size: int
    stamp: str


def is_remote(url: str) -> bool:
    """Whether `url` names an object store rather than a local path."""
    return "://" in url and not url.startswith("file://")


def normalise_url(url: str) -> str:
    """The one name of a file or folder: a URL as it is, a local path made absolute."""
    if is_remote(url):
        return url.rstrip("/")
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def split_url(url: str) -> tuple[str, str]:
    """(folder, name) of a normalised URL."""
    folder, _, name = url.rpartition("/")
    return folder or "/", name


def join_url(folder: str, name: str) -> str:
    """Inverse of `split_url`."""
    return f"{folder.rstrip('/')}/{name}"


def open_store(url: str, *, create: bool = False) -> ObjectStore:
    """An obstore store rooted at the folder `url`; `create` makes a local one.

    Raises:
        FileNotFoundError: no such local folder, without `create`.
        OSError: the folder can't be made, or something else has its name.
    """
    url = normalise_url(url)
    if is_remote(url):
        return from_url(url)
    if os.path.islink(url) and not os.path.exists(url):
        raise OSError(f"{url} is a link to {os.readlink(url)}, which is not there; make that first")
    if os.path.exists(url) and not os.path.isdir(url):
        raise OSError(f"{url} is a file; give a folder")
    if create:
        try:
            os.makedirs(url, exist_ok=True)
        except OSError as error:
            raise OSError(f"{url} can't be made: {error.strerror}; give another folder") from error
    if not os.path.isdir(url):
        raise FileNotFoundError(f"{url}: no such folder")
    return LocalStore(url)


def version(url: str) -> Version:
    """Size and stamp of the file at a normalised `url`; FileNotFoundError if there is none."""
    if not is_remote(url):
        info = os.stat(url)
        return Version(info.st_size, f"{info.st_mtime_ns}-{info.st_ctime_ns}")
    folder, name = split_url(url)
    return _version(obstore.head(open_store(folder), name))


def versions(urls: Sequence[str]) -> dict[str, Version]:
    """Sizes and stamps of those files at normalised URLs that exist."""
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        folders[split_url(url)[0]].append(url)
    found: dict[str, Version] = {}
    singly: list[str] = []
    for folder, held in folders.items():
        if is_remote(folder) and len(held) > _THREADS:
            found |= _listed_versions(folder, held)
        else:
            singly += held
    states = zip(singly, each_at_once(_version_if_any, singly), strict=True)
    return found | {url: state for url, state in states if state}


def _version_if_any(url: str) -> Version | None:
    try:
        return version(url)
    except FileNotFoundError:
        return None


def _listed_versions(folder: str, urls: Sequence[str]) -> dict[str, Version]:
    """The same by listing the folder from the first name to the last, a thousand at a time."""
    wanted = {split_url(url)[1]: url for url in urls}
    first, last = min(wanted), max(wanted)
    found = {}
    # Listings are sorted by name and begin after the offset.
    for part in obstore.list(open_store(folder), offset=first[:-1], chunk_size=1000):
        for meta in part:
            if meta["path"] in wanted:
                found[wanted[meta["path"]]] = _version(meta)
        if part and part[-1]["path"] > last:
            break
    return found


def _version(meta: obstore.ObjectMeta) -> Version:
    return Version(meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def exists(url: str) -> bool:
    """Whether there is a file at a normalised `url`."""
    return _version_if_any(url) is not None


def list_names(folder: str) -> set[str]:
    """Names right in a normalised `folder`; none for a prefix without objects.

    Local names count whatever they lead to, such as a link into a disk that is not mounted.

    Raises:
        OSError: the folder does not exist, or the store is out of reach.
    """
    try:
        if not is_remote(folder):
            return set(os.listdir(folder))
        listing = obstore.list_with_delimiter(open_store(folder))
    except UNREACHABLE as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise OSError(f"{folder} can't be listed: {why}") from error
    return {meta["path"] for meta in listing["objects"]}


def read(url: str) -> bytes:
    """All bytes of the file at a normalised `url`; FileNotFoundError if there is none."""
    if not is_remote(url):
        return Path(url).read_bytes()
    folder, name = split_url(url)
    return bytes(obstore.get(open_store(folder), name).bytes())


def put(
    store: ObjectStore,
    path: str,
    data: bytes,
    mode: Literal["create", "overwrite"] = "overwrite",
) -> None:
    """Put an object whole: others see all of it or nothing.

    Raises:
        AlreadyExistsError: `mode` is "create" and the object exists.
        OSError: the store refused; `errno` has the reason if it is a local disk.
    """
    if isinstance(store, LocalStore) and store.prefix and not os.path.isdir(store.prefix):
        # obstore would make it: under the mount point of a disk that was unmounted, say.
        raise FileNotFoundError(f"{store.prefix} is not there any more")
    try:
        # Not in parts: a killed upload's parts would stay in the bucket, where nothing lists them.
        obstore.put(store, path, data, mode=mode, use_multipart=False)
    except AlreadyExistsError:
        raise
    except BaseError as error:
        refused = OSError(f"could not write {path}: {reason(error)}")
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            refused.errno = int(number[1])
        raise refused from error


def reason(error: BaseException) -> str:
    """An error's message in one line, without obstore's page of debug output."""
    text = " ".join(str(error).partition("\n\nDebug source:")[0].split())
    return text or type(error).__name__


def each_at_once(work: Callable[[_A], _B], items: Sequence[_A]) -> list[_B]:
    """Results of `work` on each item, in order, by 32 threads: for calls that wait for a store."""
    parts = [items[number::_THREADS] for number in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda part: [work(item) for item in part], parts))
    return [found[number % _THREADS][number // _THREADS] for number in range(len(items))]
