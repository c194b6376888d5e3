"""`dataset.json`, the description of a folder of shards: names of its classes, and its splits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import obstore

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.sharding.patterns import expand_shards, is_folder

if TYPE_CHECKING:  # it imports torchvision
    from famt.pipeline.sharding.writer import Written

NAME = "dataset.json"


def described(folder: str) -> dict[str, Any] | None:
    """`classes` and `splits` of a normalised folder of shards.

    None if there is no such file, or another program's.
    """
    try:
        content: Any = json.loads(storage.read(storage.join_url(folder, NAME)))
        lists = [content["classes"], *(each["shards"] for each in content["splits"].values())]
        known = all(isinstance(each, list) for each in lists)
    except (*storage.UNREACHABLE, ValueError, TypeError, KeyError, AttributeError):
        return None
    return content if known else None


def check_dataset(out: str, classes: list[str]) -> dict[str, Any]:
    """The content of `<out>/dataset.json`, or what a new one starts with.

    Raises:
        UserError: the file is damaged, or has other classes.
    """
    folder = storage.normalise_url(out)
    content = described(folder)
    if content is None:
        url = storage.join_url(folder, NAME)
        if storage.exists(url):
            raise UserError(f"{url} is damaged; restore or remove it: it only describes the shards")
        return {"classes": classes, "splits": {}}
    if content["classes"] != classes:
        raise UserError(f"{out}/{NAME} has other classes; give each data set its own folder")
    return content


def describe_dataset(
    out: str, classes: list[str], split: str, written: Written, seed: int, source: str
) -> None:
    """Add a split to `<out>/dataset.json`; errors as of `check_dataset`."""
    content = check_dataset(out, classes)
    content["splits"][split] = {
        "samples": written.samples,
        "shards": written.shards,
        "skipped": written.skipped,
        "seed": seed,
        "source": source,
    }
    obstore.put(storage.open_store(out), NAME, json.dumps(content, indent=1).encode())


def require_one_split(patterns: list[str]) -> None:
    """Refuse a folder whose tars belong to several splits: nobody means to train on all of them.

    Raises:
        UserError: names the splits, and patterns to give.
    """
    for pattern in filter(is_folder, patterns):
        folder = storage.normalise_url(pattern)
        content = described(folder)
        if content is None:
            continue
        names = {storage.split_url(url)[1] for url in expand_shards([pattern])}
        splits = [split for split, each in content["splits"].items() if names & {*each["shards"]}]
        if len(splits) > 1:
            raise UserError(
                f"{pattern} holds the splits {' and '.join(splits)}: say which, as by "
                f"'{folder}/{splits[0]}-*.tar', or '{folder}/*.tar' for all of them"
            )
