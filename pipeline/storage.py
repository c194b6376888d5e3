"""Bytes at a path or URL: local folders and anything that obstore reaches (s3, gs, az).

Object stores take their settings from the environment, as obstore and DALI both do:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import braceexpand
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from famt.pipeline.errors import UserError

_DALI_SCHEMES = ("s3", "gs")
_AT_ONCE = 32  # questions to a file system or store
_COMPRESSED = "compressed: unpack by gunzip or the like, DALI reads plain tars alone"
_ODD = r"[^A-Za-z0-9/_.=+~@,-]"


@dataclass(frozen=True)
class Version:
    """What tells one state of a file from another without reading it.

    Attributes:
        size: bytes.
        stamp: the object's etag, or the times in ns at which the file's content and its inode were
            changed. The second, which no program can set, tells a file that was replaced at equal
            size and time.
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
    """The URL that `split_url` took apart."""
    return f"{folder.rstrip('/')}/{name}"


def open_store(url: str, *, create: bool = False) -> ObjectStore:
    """An obstore store rooted at the folder `url`; a local one is made if `create`.

    Raises:
        FileNotFoundError: a local folder that is not there, without `create`.
        OSError: it can't be made; says what is there in its place.
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


def expand(patterns: list[str]) -> list[str]:
    """Shard URLs named by paths, brace patterns, wildcards or folders of tars, in order.

    Args:
        patterns: such as `data/train-*.tar`, `s3://bucket/train-{000000..001023}.tar` or `data/`. A
            path that exists is taken as it is, whatever characters it holds.

    Returns:
        normalised URLs, each once.

    Raises:
        FileNotFoundError: a pattern matches no tar.
        OSError: a store can't be listed.
        ValueError: a name that DALI can't read, or braces that do not match.
    """
    urls: list[str] = []
    for pattern in patterns:
        for one in _expand_braces(pattern):
            found = _matches(one)
            if not found:
                raise FileNotFoundError(f"{one}: no such shards; {_remedy(one)}")
            urls += found
    for url in urls:
        _check_name(url)
    return list(dict.fromkeys(urls))


def _expand_braces(pattern: str) -> list[str]:
    if not is_remote(pattern) and os.path.exists(pattern.removeprefix("file://")):
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise UserError(f"{pattern}: {error}; give names such as train-{{000..099}}.tar") from None


def _remedy(pattern: str) -> str:
    """What may help where a pattern names no tar."""
    path = Path(pattern.removeprefix("file://"))
    if pattern.startswith("pipe:"):
        return "DALI reads files, not what a command prints: copy them, or give their s3:// URLs"
    if "::" in pattern:
        return "give several patterns one by one, with spaces between, not joined by ::"
    if is_remote(pattern) or not path.is_dir():
        return "give tars, a folder of tars, or a pattern in quotes"
    for wanted, what in (
        (
            "*.[tT][aA][rR]",
            f"its tars do not end in .tar: give '{path}/*.TAR', or as they are named",
        ),
        ("*/*.tar", f"its folders hold tars: give '{path}/*/*.tar'"),
        (
            "*.mds",
            "it holds MDS shards (MosaicML): DALI reads webdataset tars alone, make such ones",
        ),
        ("*.tgz", f"its tars are {_COMPRESSED}"),
        ("*.tar.*", f"its tars are {_COMPRESSED}"),
    ):
        if next(path.glob(wanted), None):
            return what
    return f"{path} holds no tar; `famt shards --source {path}` makes tars of images"


def _check_name(url: str) -> None:
    """Refuse a shard that could be scored but not trained on.

    DALI reads a URL by rules of its own, and fails or hangs at what they do not allow.
    """
    if re.search(r"\.(tgz|tar\.\w+)$", url):
        raise UserError(f"{url} is {_COMPRESSED}")
    if is_remote(url):
        scheme, _, name = url.partition("://")
        if scheme not in _DALI_SCHEMES:
            raise UserError(
                f"{url}: DALI reads tars from local paths, {' and '.join(_DALI_SCHEMES)} alone; "
                "copy them there (the score cache may stay)"
            )
        if odd := re.search(_ODD, name):
            raise UserError(
                f"{url}: DALI can't read a URL with {odd[0]!r}; rename it to letters, digits and "
                "/ _ - . = + ~ @ , alone"
            )
        return
    try:
        url.encode()
    except UnicodeEncodeError:
        raise UserError(f"{url!r}: DALI can't read a name that is not UTF-8; rename it") from None


def is_folder(pattern: str) -> bool:
    """Whether a pattern of shards names a folder, for all tars in it."""
    if is_remote(pattern):
        return not pattern.rstrip("/").endswith(".tar")
    return os.path.isdir(pattern.removeprefix("file://"))


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        folder, name = split_url(pattern.rstrip("/"))
        if is_folder(pattern):
            folder, name = normalise_url(pattern), "*.tar"
        if "*" not in name:
            return [pattern]
        names = sorted(list_names(folder))
        return [join_url(folder, found) for found in names if fnmatch.fnmatchcase(found, name)]
    path = pattern.removeprefix("file://")
    if is_folder(path):
        path = os.path.join(glob.escape(path), "*.tar")
    if os.path.isfile(path):
        return [normalise_url(path)]
    return [normalise_url(name) for name in sorted(glob.glob(path))]


def version(url: str) -> Version:
    """Size and stamp of the file at a normalised `url`, without reading it.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(url):
        info = os.stat(url)
        return Version(info.st_size, f"{info.st_mtime_ns}-{info.st_ctime_ns}")
    folder, name = split_url(url)
    return _version(obstore.head(open_store(folder), name))


def versions(urls: Sequence[str]) -> dict[str, Version]:
    """Size and stamp of the files at normalised URLs, of those that are there.

    Raises:
        OSError: a store or disk is out of reach.
    """
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        folders[split_url(url)[0]].append(url)
    found: dict[str, Version] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for folder, held in folders.items():
            if is_remote(folder) and len(held) > _AT_ONCE:
                found |= _listed_versions(folder, held)
                continue
            for part in pool.map(_versions, (held[n::_AT_ONCE] for n in range(_AT_ONCE))):
                found |= part
    return found


def _versions(urls: Sequence[str]) -> dict[str, Version]:
    found = {}
    for url in urls:
        with contextlib.suppress(FileNotFoundError):
            found[url] = version(url)
    return found


def _listed_versions(folder: str, urls: Sequence[str]) -> dict[str, Version]:
    """The same by listing what lies between the first name and the last, a thousand at a time."""
    wanted = {split_url(url)[1]: url for url in urls}
    first, last = min(wanted), max(wanted)
    found = {}
    # What is listed comes after the offset, in the order of names.
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
    try:
        version(url)
    except FileNotFoundError:
        return False
    return True


def list_names(folder: str) -> set[str]:
    """Names right in a normalised `folder`; none for a prefix that no object has.

    A local name counts whatever is behind it: a link into a disk that is not mounted, say.

    Raises:
        OSError: it can't be listed: a local folder that is not there, a store out of reach.
    """
    if not is_remote(folder):
        try:
            return set(os.listdir(folder))
        except OSError as error:
            raise OSError(f"{folder} can't be listed: {error.strerror}") from error
    try:
        listing = obstore.list_with_delimiter(open_store(folder))
    except BaseError as error:
        raise OSError(f"{folder} can't be listed: {reason(error)}") from error
    return {meta["path"] for meta in listing["objects"]}


def read(url: str) -> bytes:
    """All bytes of the file at a normalised `url`.

    Raises:
        FileNotFoundError: there is none.
    """
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
    """Put an object whole: it appears under its name only when all of it is there.

    Raises:
        AlreadyExistsError: `mode` is "create" and it is there already.
        OSError: the store refused; `errno` says why where the store is a local disk.
    """
    if isinstance(store, LocalStore) and store.prefix and not os.path.isdir(store.prefix):
        # It would be made again: under the mount point of a disk that was unmounted, say.
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


UNREACHABLE = (OSError, BaseError)
"""What a disk or an object store raises that can't be read or written now."""


def reason(error: BaseException) -> str:
    """What an error says, in one line: obstore adds a page of its inner state."""
    text = " ".join(str(error).partition("\n\nDebug source:")[0].split())
    return text or type(error).__name__
