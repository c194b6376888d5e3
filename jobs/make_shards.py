"""Write shuffled webdataset shards from a folder of images or a torchvision data set.

    famt shards --source photos/ --out shards/
    famt shards --source camera/ --out shards/ --unlabelled
    famt shards --source people/ --out shards/ --holdout 0.2
    famt shards --source photos/ --out shards/ --labels labels.csv
    famt shards --source cifar10 --out cifar/ --split train
    famt shards --source imagenet/val --out s3://bucket/imagenet --split val

Folders in the source are classes, unless there are images beside them or --unlabelled is given.
With --labels, classes come from a table. Pre-training needs no classes.

In a source with folders `images` and `masks`, `masks/<name>.png` holds the class of every pixel of
`images/<name>.jpg`, and 255 for no class. If all masks are black and white, white is class 1.

Writes `<split>-000000.tar`, ... and `dataset.json` (classes, counts, seed, source). With --holdout
a share of the images goes to split `val`. Files that are no images are counted by extension.

Exit code: 0 done; 1 some images could not be read and were skipped, each with its name.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from famt.jobs.options import MakeShards
from famt.pipeline.progress import progress_bar
from famt.pipeline.sharding.dataset_json import check_dataset, describe_dataset
from famt.pipeline.sharding.shards import NO_LABEL, count_endings
from famt.pipeline.sharding.sources import open_source, refuse_splits
from famt.pipeline.sharding.writer import write_shards
from famt.pipeline.wording import counted
from famt.train.command_line import parsed, run_program


def main(args: MakeShards) -> int:
    """Write the shards; returns 1 if any image was skipped."""
    classes, items, passed_over, unlisted = open_source(
        args.source, args.split, args.download_to, args.labels
    )
    if args.unlabelled:
        classes, items = [], [dataclasses.replace(item, label=NO_LABEL) for item in items]
    elif not args.labels:
        refuse_splits(args.source, classes)
    order = np.random.default_rng(args.seed).permutation(len(items))
    held_out = set(order[: int(len(items) * args.holdout)].tolist())
    parts = {args.split: [item for n, item in enumerate(items) if n not in held_out]}
    if held_out:
        parts["val"] = [items[n] for n in sorted(held_out)]
    check_dataset(args.out, classes)
    skipped = 0
    for split, part in parts.items():
        with progress_bar(total=len(part), desc=f"{split} shards", unit=" images") as bar:
            written = write_shards(
                part,
                args.out,
                split,
                seed=args.seed,
                samples_per_shard=args.samples_per_shard,
                encoding=args.encoding,
                on_sample=bar.update,
            )
        describe_dataset(args.out, classes, split, written, args.seed, args.source)
        kinds = "with masks" if any(each.mask for each in part) else "without classes"
        if classes:
            kinds = f"of {counted(len(classes), 'class')}"
        print(
            f"{split}: {counted(written.samples, 'image')} {kinds} in "
            f"{counted(len(written.shards), 'shard')} at {args.out}"
        )
        if written.transparent:
            print(
                f"{split}: transparent: {counted(written.transparent, 'image')}; their colours are "
                "used, also of pixels that would not be seen",
                file=sys.stderr,
            )
        for name, reason in written.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        skipped += len(written.skipped)
    if unlisted:
        print(
            f"{counted(len(unlisted), 'image')} without a row in {args.labels}, and so no class: "
            f"{', '.join(unlisted[:3])}{', ...' if len(unlisted) > 3 else ''}",
            file=sys.stderr,
        )
    if passed_over:
        print(f"ignored files that are no images: {count_endings(passed_over)}", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    run_program(main, parsed(MakeShards, __doc__))
