"""What must hold of the images to learn from and of those to test on, taken together."""

from __future__ import annotations

import sys
from itertools import zip_longest

from famt.pipeline import storage
from famt.pipeline.dataset_json import NAME, described
from famt.pipeline.errors import UserError
from famt.train.evaluate.features import Images


def check_pair(train: Images, val: Images) -> None:
    """Refuse sets whose figures would say nothing, and say which images are left out of them.

    Raises:
        UserError: images are in both, or a class has one name here and another there.
    """
    learned = dict(zip(train.table.shard_ids, train.table.urls, strict=True))
    for shard_id, url in zip(val.table.shard_ids, val.table.urls, strict=True):
        if shard_id in learned:
            raise UserError(
                f"{learned[shard_id]} of --train and {url} of --val hold the same images: what was "
                "learned is tested on images held out; give others to --val"
            )
    _compare_names(train, val)
    for images in (train, val):
        left_out = images.table.left_out() if images.ranks.is_main else []
        if left_out:
            print(
                f"warning: {len(left_out)} image(s) of --{images.name} are left out; the first is "
                f"{left_out[0]}",
                file=sys.stderr,
            )


def _compare_names(train: Images, val: Images) -> None:
    """Refuse classes whose numbers stand for other names in another folder of shards."""
    folders = dict.fromkeys(storage.split_url(url)[0] for url in train.table.urls + val.table.urls)
    known = {folder: told["classes"] for folder in folders if (told := described(folder))}
    first = next(iter(known), "")
    for folder, classes in known.items():
        for number, names in enumerate(zip_longest(known[first], classes)):
            if len({*names} - {None}) > 1:
                raise UserError(
                    f"class {number} is {names[0]!r} by {first}/{NAME} and {names[1]!r} by "
                    f"{folder}/{NAME}: make the shards of both anew from folders with the same "
                    "classes"
                )
