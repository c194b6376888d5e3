"""Images and classes into webdataset shards, shuffled once and for all."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import obstore
import torchvision.datasets
import webdataset
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from famt.pipeline import storage
from famt.pipeline.dataset_json import NAME, described
from famt.pipeline.errors import UserError
from famt.pipeline.labels import class_names, find_label, read_labels
from famt.pipeline.options import Encoding
from famt.pipeline.segmentation_masks import decode_mask
from famt.pipeline.shards import IMAGE_EXTENSIONS, MASK_EXTENSION, NO_LABEL, count_endings

TORCHVISION_SOURCES = ("cifar10", "cifar100", "flowers102", "food101", "stl10")
DIGITS = "digits"


@dataclass(frozen=True)
class Item:
    """One image of a source: a name to trace it by, its class or `NO_LABEL`, and its content.

    Attributes:
        mask: gives the PNG of its mask, for an image of the given file.
    """

    name: str
    label: int
    load: Callable[[], Path | Image.Image]
    mask: Callable[[], bytes] | None = None


class Source(NamedTuple):
    """Class names and images of a source, and what was left out.

    Attributes:
        passed_over: how many other files its folder holds, by ending.
        unlisted: images that the file of labels does not list; they have no class.
    """

    classes: list[str]
    items: list[Item]
    passed_over: dict[str, int]
    unlisted: list[str] = []  # noqa: RUF012


@dataclass(frozen=True)
class Written:
    """What was written: shard names, samples in them, and what was left out, with reasons."""

    shards: list[str]
    samples: int
    skipped: list[tuple[str, str]]


def open_source(
    source: str, split: str, download_to: str | None = None, labels: Path | None = None
) -> Source:
    """What an image folder, a torchvision data set, or scikit-learn's digits hold.

    An image right in the folder has no class; so if there is any, no image of the folder has, at
    whatever depth it lies. In a folder of `images` and `masks`, `masks/<name>.png` tells the class
    of every pixel of `images/<name>.jpg`, in place of a class for the image.

    Args:
        source: a folder `class/name.jpg`, without classes, or of `images` and `masks`, one
            of `TORCHVISION_SOURCES`, or "digits".
        split: "train" for the training half of a torchvision data set, else its test half.
        download_to: where torchvision keeps its files; it downloads what is not there.
        labels: a file that lists the classes of a folder's images; see `famt.pipeline.labels`.

    Raises:
        FileNotFoundError: no such folder or file, no images in it, or an image without its mask.
        UserError: the digits, of which there is but one set, as anything but "train"; labels of
            what is no folder, or that list none of its images.
    """
    if labels and not Path(source).is_dir():
        raise UserError(f"--labels lists the classes of a folder's images, and {source} is none")
    if source == DIGITS:
        if split != "train":
            raise UserError(
                f"{DIGITS} has no split of its own; hold some of it out (--holdout 0.2)"
            )
        return _digits()
    if source in TORCHVISION_SOURCES:
        return _torchvision(
            source, split, download_to or str(Path.home() / ".cache" / "torchvision")
        )
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"{source} is no folder; give a folder of images or of class folders, or one of "
            f"{', '.join((DIGITS, *TORCHVISION_SOURCES))}"
        )
    if labels:
        return _listed(Path(source), labels)
    if {"images", "masks"} <= {path.name for path in Path(source).iterdir() if path.is_dir()}:
        return _masked(Path(source))
    images, others = _files(source)
    if any(len(name.parts) == 1 for name in images):
        items = [Item(str(name), NO_LABEL, partial(Path, source, name)) for name in images]
        return Source([], items, others)
    # Empty ones too: a class keeps its number in a split that has no image of it.
    folders = (path.name for path in Path(source).iterdir() if path.is_dir())
    classes = sorted(name for name in folders if not name.startswith("."))
    label = {name: number for number, name in enumerate(classes)}
    items = [Item(str(name), label[name.parts[0]], partial(Path, source, name)) for name in images]
    return Source(classes, items, others)


def write_shards(
    items: Sequence[Item],
    out: str,
    split: str,
    *,
    seed: int,
    samples_per_shard: int,
    encoding: Encoding,
    on_sample: Callable[[], None] = lambda: None,
) -> Written:
    """Write `<out>/<split>-%06d.tar`, in an order shuffled by `seed`.

    A shard appears under its name only when it is whole. The same items and seed give the same
    bytes, so the score cache knows them again. An image that can't be read is skipped and reported.

    Args:
        items: what to write.
        out: local folder or object-store URL; made if it is not there.
        split: prefix of the shards' names.
        samples_per_shard: the last shard may hold fewer.
        on_sample: called once an item.

    Raises:
        FileExistsError: `out` has shards of this split already.
    """
    store = storage.open_store(out, create=True)
    taken = obstore.list_with_delimiter(store)["objects"]
    if any(re.fullmatch(rf"{re.escape(split)}-\d{{6}}\.tar", meta["path"]) for meta in taken):
        raise FileExistsError(f"{out} has {split} shards already; remove them or choose another")
    shards: list[str] = []
    skipped: list[tuple[str, str]] = []

    def publish(path: str) -> None:
        name = Path(path).name
        with open(path, "rb") as file:
            obstore.put(store, name, file)
        Path(path).unlink()
        shards.append(name)

    with tempfile.TemporaryDirectory(prefix="famt-shards-") as scratch:
        writer = webdataset.ShardWriter(
            f"{scratch}/{split}-%06d.tar",
            maxcount=samples_per_shard,
            maxsize=1 << 40,
            post=publish,
            verbose=0,
            mtime=0,
        )
        for number in np.random.default_rng(seed).permutation(len(items)).tolist():
            item = items[number]
            try:
                extension, data = _encode(item.load(), encoding)
                mask = {MASK_EXTENSION: item.mask()} if item.mask else {}
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                skipped.append((item.name, f"{type(error).__name__}: {error}"))
            else:
                key = f"{number:08d}-{safe_key(item.name)}"
                label = {} if item.label == NO_LABEL else {"cls": str(item.label).encode()}
                writer.write({"__key__": key, extension: data, **label, **mask})
            on_sample()
        writer.close()
    return Written(shards, len(items) - len(skipped), skipped)


def check_dataset(out: str, classes: list[str]) -> dict[str, Any]:
    """The content of `<out>/dataset.json`, or what a new one starts with.

    Raises:
        ValueError: the file is there and damaged, or speaks of other classes.
    """
    folder = storage.normalise_url(out)
    told = described(folder)
    if told is None:
        url = storage.join_url(folder, NAME)
        if storage.exists(url):
            raise UserError(f"{url} is damaged; restore or remove it: it only describes the shards")
        return {"classes": classes, "splits": {}}
    if told["classes"] != classes:
        raise UserError(f"{out}/{NAME} has other classes; give each data set its own folder")
    return told


def describe_dataset(
    out: str, classes: list[str], split: str, written: Written, seed: int, source: str
) -> None:
    """Add a split to `<out>/dataset.json`.

    Raises:
        ValueError: the file is there and speaks of other classes.
    """
    told = check_dataset(out, classes)
    told["splits"][split] = {
        "samples": written.samples,
        "shards": written.shards,
        "skipped": written.skipped,
        "seed": seed,
        "source": source,
    }
    text = json.dumps(told, indent=1).encode()
    obstore.put(storage.open_store(out), NAME, text)


def safe_key(name: str) -> str:
    """A source name less its suffix, all but letters, digits, `-` and `_` turned into `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name.rpartition(".")[0] or name)


def _files(folder: str) -> tuple[list[Path], dict[str, int]]:
    """Image files below a folder, relative to it, in the order of names, and endings of the others.

    Hidden files are neither.

    Raises:
        FileNotFoundError: none is an image.
    """
    images, others = [], Counter[str]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if has_file_allowed_extension(name, IMG_EXTENSIONS):
                images.append(Path(parent, name).relative_to(folder))
            else:
                others[Path(name).suffix.lower()] += 1
    if not images:
        but = f", but {count_endings(others)}" if others else ""
        raise FileNotFoundError(f"{folder} holds no images{but}")
    return sorted(images), dict(others)


def _listed(folder: Path, path: Path) -> Source:
    """Images whose classes stand in a file."""
    images, others = _files(str(folder))
    labels = read_labels(path)
    classes = class_names(labels)
    number = {name: each for each, name in enumerate(classes)}
    found = {image: find_label(labels, image) for image in images}
    unlisted = [str(image) for image, label in found.items() if label is None]
    if len(unlisted) == len(images):
        raise UserError(
            f"{path} lists none of the images in {folder}: {next(iter(labels))} is one of its, "
            f"{images[0]} one of the folder's"
        )
    items = [
        Item(str(image), NO_LABEL if label is None else number[label], partial(Path, folder, image))
        for image, label in found.items()
    ]
    return Source(classes, items, others, unlisted)


def _masked(folder: Path) -> Source:
    """Images with masks."""
    names, others = _files(str(folder / "images"))
    paths = {name: (folder / "masks" / name).with_suffix(".png") for name in names}
    for name, path in paths.items():
        if not path.is_file():
            raise FileNotFoundError(f"{folder / 'images' / name} has no mask {path}")
    binary = all(map(_is_binary, paths.values()))
    items = []
    for name, path in paths.items():
        image = folder / "images" / name
        mask = partial(_mask, image, path, binary)
        items.append(Item(str(name), NO_LABEL, partial(Path, image), mask))
    return Source([], items, others)


def _is_binary(path: Path) -> bool:
    """Whether a mask holds but 0 and 255; one that can't be read says nothing."""
    try:
        return not np.setdiff1d(decode_mask(path.read_bytes()).numpy(), (0, 255)).size
    except ValueError:
        return True


def _mask(image: Path, path: Path, binary: bool) -> bytes:
    """The PNG of a mask; if masks are black and white, white becomes class 1."""
    png = path.read_bytes()
    labels = decode_mask(png)
    height, width = labels.shape
    with Image.open(image) as opened:
        upright = ImageOps.exif_transpose(opened).size
    if abs(width * upright[1] / upright[0] - height) > 1:  # it may be smaller or larger
        raise UserError(
            f"mask {path.name} of {width} x {height} px has not the shape of its upright image, "
            f"{upright[0]} x {upright[1]} px"
        )
    if not binary:
        return png
    buffer = io.BytesIO()
    Image.fromarray((labels == 255).numpy().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _encode(source: Path | Image.Image, encoding: Encoding) -> tuple[str, bytes]:
    if isinstance(source, Path):
        suffix = source.suffix.lower().lstrip(".")
        if suffix in IMAGE_EXTENSIONS and encoding.max_side is None:
            return suffix, source.read_bytes()
        with Image.open(source) as opened:
            if opened.mode.startswith(("I", "F")):
                raise UserError(f"{opened.mode} pixels of more than 8 bits are not supported")
            image = ImageOps.exif_transpose(opened).convert("RGB")
        lossless = suffix not in ("jpg", "jpeg", "webp") and encoding.max_side is None
    else:
        image, lossless = source, encoding.max_side is None
    if encoding.max_side is not None:
        image.thumbnail((encoding.max_side, encoding.max_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=encoding.quality)
    return "jpg", buffer.getvalue()


def _torchvision(source: str, split: str, root: str) -> Source:
    factory = {
        "cifar10": torchvision.datasets.CIFAR10,
        "cifar100": torchvision.datasets.CIFAR100,
        "flowers102": torchvision.datasets.Flowers102,
        "food101": torchvision.datasets.Food101,
        "stl10": torchvision.datasets.STL10,
    }[source]
    half = "train" if split == "train" else "test"
    chosen = {"train": half == "train"} if source.startswith("cifar") else {"split": half}
    dataset = factory(root, download=True, **chosen)
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = dataset._labels if hasattr(dataset, "_labels") else dataset.labels
    classes = getattr(dataset, "classes", None) or [str(n) for n in range(max(targets) + 1)]
    items = [
        Item(f"{source}-{half}-{number:06d}", int(label), partial(_picture, dataset, number))
        for number, label in enumerate(targets)
    ]
    return Source(list(classes), items, {})


def _picture(dataset: torchvision.datasets.VisionDataset, number: int) -> Image.Image:
    image: Image.Image = dataset[number][0]
    return image.convert("RGB")


def _digits() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 px, enlarged to 32 x 32."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    items = [
        Item(f"digit-{number:04d}", int(label), partial(_digit_image, digits.images[number]))
        for number, label in enumerate(digits.target)
    ]
    return Source([str(digit) for digit in range(10)], items, {})


def _digit_image(values: np.ndarray) -> Image.Image:
    pixels = np.round(values / 16 * 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
