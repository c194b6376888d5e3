"""Checks of training and test images as a pair."""

from __future__ import annotations

import sys
from itertools import zip_longest

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.sharding.dataset_json import NAME, described
from famt.pipeline.wording import counted
from famt.train.evaluate.features import Images


def check_pair(train: Images, val: Images) -> None:
    """Refuse sets whose results would mean nothing, and warn of images that are left out.

    Raises:
        UserError: the sets share images, or a class has different names in them.
    """
    learned = dict(zip(train.table.shard_ids, train.table.urls, strict=True))
    for shard_id, url in zip(val.table.shard_ids, val.table.urls, strict=True):
        if shard_id in learned:
            raise UserError(
                f"{learned[shard_id]} of --train and {url} of --val hold the same images; test on "
                "images that nothing was learned from"
            )
    _compare_names(train, val)
    for images in (train, val):
        left_out = images.table.left_out() if images.ranks.is_main else []
        if left_out:
            print(
                f"warning: {counted(len(left_out), 'image')} of --{images.name} left out, "
                f"{left_out[0]} the first",
                file=sys.stderr,
            )


def _compare_names(train: Images, val: Images) -> None:
    """Refuse class numbers that stand for different names in different folders of shards."""
    folders = dict.fromkeys(storage.split_url(url)[0] for url in train.table.urls + val.table.urls)
    known = {each: about["classes"] for each in folders if (about := described(each))}
    first = next(iter(known), "")
    for folder, classes in known.items():
        for number, names in enumerate(zip_longest(known[first], classes)):
            if len({*names} - {None}) > 1:
                raise UserError(
                    f"class {number} is {names[0]!r} in {first}/{NAME} and {names[1]!r} in "
                    f"{folder}/{NAME}; make both sets of shards again, with the same classes"
                )
