"""`dataset.json`, which tells what a folder of shards holds: names of classes, and splits."""

from __future__ import annotations

import json
from typing import Any

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.patterns import expand_shards, is_folder

NAME = "dataset.json"


def described(folder: str) -> dict[str, Any] | None:
    """`classes` and `splits` of a normalised folder of shards, as `make_shards` describes it.

    None where no such file can be read: it may be another program's, or there is none.
    """
    try:
        told: Any = json.loads(storage.read(storage.join_url(folder, NAME)))
        lists = [told["classes"], *(each["shards"] for each in told["splits"].values())]
        known = all(isinstance(each, list) for each in lists)
    except (*storage.UNREACHABLE, ValueError, TypeError, KeyError, AttributeError):
        return None
    return told if known else None


def require_one_split(patterns: list[str]) -> None:
    """Refuse a folder whose tars are of several splits: to train on all of them is never meant.

    Raises:
        UserError: names the splits, and patterns to give.
    """
    for pattern in filter(is_folder, patterns):
        folder = storage.normalise_url(pattern)
        told = described(folder)
        if told is None:
            continue
        names = {storage.split_url(url)[1] for url in expand_shards([pattern])}
        splits = [split for split, each in told["splits"].items() if names & {*each["shards"]}]
        if len(splits) > 1:
            raise UserError(
                f"{pattern} holds the splits {' and '.join(splits)}: say which, as by "
                f"'{folder}/{splits[0]}-*.tar', or '{folder}/*.tar' for all of them"
            )
