"""From patterns of shards, as users type them, to the URLs of tars that DALI can read."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path

import braceexpand

from famt.pipeline.errors import UserError
from famt.pipeline.storage import is_remote, join_url, list_names, normalise_url, split_url

_DALI_SCHEMES = ("s3", "gs")
_COMPRESSED = "compressed: unpack by gunzip or the like, DALI reads plain tars alone"
_ODD = r"[^A-Za-z0-9/_.=+~@,-]"


def expand_shards(patterns: list[str]) -> list[str]:
    """URLs of the shards that paths, brace patterns, wildcards or folders of tars name, in order.

    Args:
        patterns: such as `data/train-*.tar`, `s3://bucket/train-{000000..001023}.tar` or `data/`. A
            path that exists is taken literally, whatever characters it holds; so is the folder of a
            pattern.

    Returns:
        normalised URLs, each once.

    Raises:
        FileNotFoundError: a pattern matches no tar.
        OSError: a store can't be listed.
        UserError: a name that DALI can't read, or unbalanced braces.
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


def is_folder(pattern: str) -> bool:
    """Whether a pattern names a folder, and so all tars in it."""
    if is_remote(pattern):
        return not pattern.rstrip("/").endswith(".tar")
    return os.path.isdir(pattern.removeprefix("file://"))


def _expand_braces(pattern: str) -> list[str]:
    folder, name = "", pattern
    if not is_remote(pattern):
        if os.path.exists(pattern.removeprefix("file://")):
            return [pattern]
        folder, name = _literal_folder(pattern)
    try:
        return [folder + each for each in braceexpand.braceexpand(name, escape=False)]
    except ValueError as error:
        raise UserError(f"{pattern}: {error}; give names such as train-{{000..099}}.tar") from None


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
    folder, name = _literal_folder(path)
    return [normalise_url(each) for each in sorted(glob.glob(glob.escape(folder) + name))]


def _literal_folder(pattern: str) -> tuple[str, str]:
    """A pattern in two: its folder with a slash, if that exists, and the rest."""
    folder, slash, name = pattern.rpartition("/")
    return (
        (folder + slash, name) if os.path.isdir(folder.removeprefix("file://")) else ("", pattern)
    )


def _remedy(pattern: str) -> str:
    """What to do about a pattern that matches no tar."""
    path = Path(pattern.removeprefix("file://"))
    if pattern.startswith("pipe:"):
        return "DALI reads files, not what a command prints: copy them, or give their s3:// URLs"
    if "::" in pattern:
        return "give several patterns one by one, with spaces between, not joined by ::"
    if is_remote(pattern) or not path.is_dir():
        return "give tars, a folder of tars, or a pattern in quotes"
    for wanted, what in (
        ("*.[tT][aA][rR]", f"its tars do not end in .tar: give '{path}/*.TAR', or as named"),
        ("*/*.tar", f"its folders hold tars: give '{path}/*/*.tar'"),
        ("*.mds", "it holds MDS shards (MosaicML), and DALI reads webdataset tars alone"),
        ("*.tgz", f"its tars are {_COMPRESSED}"),
        ("*.tar.*", f"its tars are {_COMPRESSED}"),
    ):
        if next(path.glob(wanted), None):
            return what
    return f"{path} holds no tar; `famt shards --source {path}` makes tars of images"


def _check_name(url: str) -> None:
    """Refuse a name at which DALI would fail or hang, before anything is scored."""
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
