"""A training from a folder of images: its shards and scores, and options that suit a first run.

`famt pretrain --data photos --out runs/first` makes in runs/first/data what is not there yet.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from famt.jobs import make_shards, precompute_freq
from famt.jobs.options import MakeShards, PrecomputeFreq
from famt.pipeline.dataset_json import described
from famt.pipeline.errors import UserError
from famt.pipeline.sources import open_source
from famt.train import export
from famt.train.options import Export

_LOOKED_AT = 200  # images whose sizes are read
_HELD_OUT = 0.1  # share of labelled images that the monitor tests k-NN on
_MONITORED = 500  # images that are enough for that
# Crops of a first run: an hour or two of two cores, an hour or so of a GPU.
_CROPS = {"cpu": 200_000, "gpu": 10_000_000}


@dataclass(frozen=True)
class Images:
    """What a folder holds.

    Attributes:
        count: images.
        classes: of them; 0 if they have none.
        side: median of their shorter sides, px.
    """

    count: int
    classes: int
    side: int

    @property
    def can_be_monitored(self) -> bool:
        """Whether k-NN on a part of them says something."""
        return self.classes > 1 and self.count >= _MONITORED


def look_at(data: str) -> Images:
    """Count the images of a folder or named data set, and read the sizes of some.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
    """
    classes, items, *_ = open_source(data, "train")
    sides = []
    for number in np.random.default_rng(0).permutation(len(items))[:_LOOKED_AT].tolist():
        content = items[number].load()
        try:
            with Image.open(content) if isinstance(content, Path) else content as image:
                sides.append(min(image.size))
        except (OSError, ValueError):  # `famt shards` will name it
            continue
    if not sides:
        raise UserError(f"{data}: none of its images can be read")
    return Images(len(items), len(classes), round(statistics.median(sides)))


def suggest(images: Images, *, gpu: bool) -> dict[str, str]:
    """Options of a first run, by name: sizes by the images, model and length by the machine."""
    if images.side < 48:
        size, patch = 32, 4
    elif images.side < 112:
        size, patch = 64, 8
    else:
        size, patch = (224, 16) if gpu else (96, 8)
    options = {
        "image-size": str(size),
        "patch-size": str(patch),
        "batch-size": str(min(256 if gpu else 64, max(1, images.count // 4))),
        "epochs": str(min(800, max(10, round(_CROPS["gpu" if gpu else "cpu"] / images.count)))),
    }
    if gpu:
        big = images.count >= 500_000
        return {"model": "vit_base" if big else "vit_small", "precision": "bf16", **options}
    return {"model": "vit_nano", "optimiser.base-learning-rate": "2e-3", **options}


def suggested(data: str, out: Path, given: list[str]) -> list[str]:
    """The words of a command line that `--data` stands for, before those that are given.

    A recipe or a model that is named has sizes and a length of its own.
    """
    folder = _folder(out)
    words = ["--shards", str(folder / "shards" / "train-*.tar"), "--cache", str(folder / "scores")]
    images = look_at(data)
    if images.can_be_monitored and not _has(given, "monitor"):
        words += ["--monitor", str(folder / "shards" / "val-*.tar")]
    if not (_has(given, "recipe") or _has(given, "model")):
        import torch

        gpu = torch.cuda.is_available() and not _has(given, "device", "cpu")
        options = suggest(images, gpu=gpu)
        where = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
        chosen = [word for name, value in options.items() for word in (f"--{name}", value)]
        print(
            f"{data}: {images.count} images, {images.classes or 'no'} classes, {images.side} px "
            f"at the median. For a first run on {where}: {' '.join(chosen)}",
            file=sys.stderr,
        )
        words += chosen
    return words


def prepare(data: str, out: Path, *, scored: bool) -> None:
    """Make the shards and scores of a run in `out` that are not there yet.

    Raises:
        UserError: shards of another source are there, or some could not be scored.
    """
    folder = _folder(out)
    shards = folder / "shards"
    making = shards / "making"  # there while shards are written: what it lies beside is ours
    if making.exists():
        for half_made in (*shards.glob("*.tar"), *shards.glob("dataset.json")):
            half_made.unlink()
    known = ((described(str(shards)) or {}).get("splits") or {}).get("train")
    if known is None:
        if any(shards.glob("*.tar")):
            raise UserError(
                f"{shards} holds tars that --data did not make: give another --out, or train on "
                "them by --shards and --cache"
            )
        shards.mkdir(parents=True, exist_ok=True)
        making.touch()
        held_out = _HELD_OUT if look_at(data).can_be_monitored else 0.0
        make_shards.main(MakeShards(source=data, out=str(shards), holdout=held_out))
        making.unlink()
    elif known["source"] != data:
        raise UserError(
            f"{shards} holds the images of {known['source']}; give another --out for {data}"
        )
    if scored:
        pattern = str(shards / "train-*.tar")
        job = PrecomputeFreq(shards=[pattern], cache=str(folder / "scores"), max_bad=1.0)
        if precompute_freq.main(job):
            raise UserError(f"the scores of {shards} are not complete, for the reasons above")


def finish(out: Path) -> None:
    """Export the encoder of a run that is done, and say what to do with it."""
    exported = out / "encoder"
    if not exported.exists():
        export.main(Export(checkpoint=out, to="timm", out=exported))
    shards = _folder(out) / "shards"
    print(f"\nencoder: {exported}, for timm as printed above\npage:    famt report {out}")
    if list(shards.glob("val-*.tar")):
        print(
            f"probe:   famt evaluate probe --checkpoint {out} --cache {_folder(out) / 'scores'} "
            f"--train '{shards}/train-*.tar' --val '{shards}/val-*.tar'"
        )


def _folder(out: Path) -> Path:
    return out / "data"


def _has(words: list[str], option: str, value: str | None = None) -> bool:
    """Whether a command line gives an option, and that value if one is named."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, inline = word.partition("=")
        if name == f"--{option}" and value in (None, inline if equals else following):
            return True
    return False
