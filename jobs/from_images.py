"""Pre-training from a folder of images: shards, scores, and options that suit a first run.

`famt pretrain --data photos --out runs/first` keeps shards and scores in runs/first/data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from famt.jobs import make_shards, precompute_freq
from famt.jobs.options import MakeShards, PrecomputeFreq, RayPretrain
from famt.pipeline.errors import UserError
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.sharding.sources import open_source
from famt.pipeline.wording import counted
from famt.train import export
from famt.train.config import TIMM
from famt.train.program_options import Export
from famt.train.recipe import Recipe, load
from famt.train.run_folder import written_whole

_LOOKED_AT = 200  # images to read the sizes of
_HELD_OUT = 0.1  # share of labelled images for the monitor
_MONITORED = 500  # images, the least for a monitor
_WITHOUT_GPU = "laptop"  # recipe
# Crops of a first run: one to two hours of two cores, about an hour of a GPU.
_CROPS = {"cpu": 200_000, "gpu": 10_000_000}


@dataclass(frozen=True)
class Images:
    """Statistics of a folder of images.

    Attributes:
        count: number of images.
        classes: number of classes; 0 without labels.
        side: median of the shorter sides, px.
    """

    count: int
    classes: int
    side: int

    @property
    def can_be_monitored(self) -> bool:
        """Whether a part of them is enough for k-NN."""
        return self.classes > 1 and self.count >= _MONITORED


def look_at(data: str, labels: Path | None = None) -> Images:
    """Count the images of a folder or named data set, and read some of their sizes.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
    """
    classes, items, *_ = open_source(data, "train", labels=labels)
    sides = []
    for number in np.random.default_rng(0).permutation(len(items))[:_LOOKED_AT].tolist():
        content = items[number].load()
        try:
            with Image.open(content) if isinstance(content, Path) else content as image:
                sides.append(min(image.size))
        except (OSError, ValueError):  # `famt shards` will name the file
            continue
    if not sides:
        raise UserError(f"{data}: no image can be read")
    return Images(len(items), len(classes), round(statistics.median(sides)))


def suggest(images: Images, *, gpu: bool) -> dict[str, str]:
    """Options of a first run: sizes that suit the images, model and length for the machine."""
    if images.side < 48:
        size, patch = 32, 4
    elif images.side < 112:
        size, patch = 64, 8
    else:
        size, patch = (224, 16) if gpu else (96, 8)
    if gpu:
        big = images.count >= 500_000
        options = {"model": "vit_base" if big else "vit_small", "precision": "bf16"}
    else:
        words = load(_WITHOUT_GPU).options
        options = dict(zip((each[2:] for each in words[::2]), words[1::2], strict=True))
    return {
        **options,
        "image-size": str(size),
        "patch-size": str(patch),
        "batch-size": str(min(256 if gpu else 64, max(1, images.count // 4))),
        "epochs": str(min(800, max(10, round(_CROPS["gpu" if gpu else "cpu"] / images.count)))),
    }


def suggested(given: RayPretrain, words: list[str]) -> list[str]:
    """The options that `--data` implies, for all that neither the command line nor the recipe sets.

    Args:
        given: the options of the command line.
        words: the command line, each option without its value.
    """
    assert given.data is not None
    folder = _folder(given.out)
    implied = ["--shards", f"{folder}/shards/train-*.tar", "--cache", f"{folder}/scores"]
    images = look_at(given.data, given.labels)
    if images.can_be_monitored and not given.monitor:
        implied += ["--monitor", f"{folder}/shards/val-*.tar"]
    gpu = torch.cuda.is_available() and given.device != "cpu"
    where = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    options, taken = suggest(images, gpu=gpu), {*words}
    if not gpu and not {"--recipe", "--model"} & taken:
        options = {"recipe": _WITHOUT_GPU, **options}
    base: Recipe | None = load(given.recipe)
    while base and base.extends:  # the default recipe leaves all of them open
        taken |= {each.partition("=")[0] for each in base.options}
        base = base.extends
    if "--model" in taken:  # the rate is that of the model
        options.pop("optimiser.base-learning-rate", None)
        if given.model.startswith(TIMM):  # so are the sizes
            taken |= {"--image-size", "--patch-size"}
    chosen = [
        word
        for name, value in options.items()
        if f"--{name}" not in taken
        for word in (f"--{name}", value)
    ]
    classes = counted(images.classes, "class") if images.classes else "without classes"
    held_out = f", {_HELD_OUT:.0%} held out" if images.can_be_monitored else ""
    print(
        f"{given.data}: {counted(images.count, 'image')}{held_out}, {classes}, median side "
        f"{images.side} px. Chosen for a first run on {where}: {' '.join(chosen) or 'nothing'}",
        file=sys.stderr,
    )
    return implied + chosen


def prepare(data: str, labels: Path | None, out: Path, spec: ScoreSpec | None) -> None:
    """Make shards, and scores by `spec` if given, in `<out>/data`, unless they are there.

    `<out>/data/source.json` records the source of the shards and a digest of the names and classes
    of its images. It is written before the first shard, and again, `complete`, after the last.

    Raises:
        UserError: the shards are of other images or classes, or some could not be scored.
    """
    folder = _folder(out)
    shards, record = folder / "shards", folder / "source.json"
    source = _resolved(data)
    wanted = {"source": source, "images": _digest(data, labels), "complete": True}
    known = json.loads(record.read_text()) if record.exists() else None
    if known is None and any(shards.glob("*.tar")):
        raise UserError(
            f"{shards} holds tars that --data did not make: give another --out, or train on them "
            "with --shards and --cache"
        )
    if known is None or not known["complete"]:
        for half_made in (*shards.glob("*.tar"), *shards.glob("dataset.json")):
            half_made.unlink()
        shards.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({**wanted, "complete": False}))
        held_out = _HELD_OUT if look_at(data, labels).can_be_monitored else 0.0
        make_shards.main(MakeShards(data, str(shards), holdout=held_out, labels=labels))
        with written_whole(record) as file:
            file.write(json.dumps(wanted).encode())
    elif _resolved(known["source"]) != source:
        raise UserError(
            f"{shards} holds the images of {known['source']}; give another --out for {source}, or "
            "train on the shards with --shards and --cache"
        )
    elif known["images"] != wanted["images"]:
        raise UserError(
            f"{shards} was made before the images or classes of {data} changed; give another "
            f"--out, or remove {out} to start over"
        )
    if spec:
        job = PrecomputeFreq([f"{shards}/train-*.tar"], f"{folder}/scores", spec, max_bad=1.0)
        if precompute_freq.main(job):
            raise UserError(f"some images of {shards} have no scores, for the reasons above")


def finish(out: Path) -> None:
    """Export the encoder of a finished run, and print the next commands."""
    exported = out / "encoder"
    if not exported.exists():
        export.main(Export(checkpoint=out, to="timm", out=exported))
    shards = _folder(out) / "shards"
    print(f'\nencoder: timm.create_model("local-dir:{exported}", pretrained=True)')
    if list(shards.glob("val-*.tar")):
        words = ["--checkpoint", out, "--cache", _folder(out) / "scores"]
        words += ["--train", shards / "train-*.tar", "--val", shards / "val-*.tar"]
        inputs = shlex.join(map(str, words))
        # Attentive pooling takes most of a probe's time.
        print(f"k-NN:    famt evaluate knn {inputs}")
        print(f"probe:   famt evaluate probe {inputs} --poolings cls mean")


def _folder(out: Path) -> Path:
    return out / "data"


def _resolved(data: str) -> str:
    """The one name of a folder; other names are those of data sets."""
    return str(Path(data).resolve()) if Path(data).is_dir() else data


def _digest(data: str, labels: Path | None) -> str:
    """Digest of names and classes of the images, without their pixels."""
    classes, items, *_ = open_source(data, "train", labels=labels)
    text = json.dumps([classes, [(item.name, item.label) for item in items]])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
