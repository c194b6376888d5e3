"""Sources of images: folders, torchvision's data sets, scikit-learn's digits."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torchvision.datasets
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from famt.pipeline.errors import UserError
from famt.pipeline.sharding.labels import class_names, find_label, read_labels
from famt.pipeline.sharding.segmentation_masks import decode_mask
from famt.pipeline.sharding.shards import NO_LABEL, count_endings

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled"}
_TORCHVISION = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "flowers102": torchvision.datasets.Flowers102,
    "food101": torchvision.datasets.Food101,
    "stl10": torchvision.datasets.STL10,
}
DIGITS = "digits"


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        name: path in its folder, or its number in a data set.
        label: its class, or `NO_LABEL`.
        load: gives its file or its pixels.
        mask: gives the PNG of its segmentation mask.
    """

    name: str
    label: int
    load: Callable[[], Path | Image.Image]
    mask: Callable[[], bytes] | None = None


class Source(NamedTuple):
    """Images of a source, and what it left out.

    Attributes:
        classes: names, by number.
        passed_over: number of files that are no images, by ending.
        unlisted: images without a class because the file of labels does not list them.
    """

    classes: list[str]
    items: list[Item]
    passed_over: dict[str, int]
    unlisted: list[str] = []  # noqa: RUF012


def open_source(
    source: str, split: str, download_to: str | None = None, labels: Path | None = None
) -> Source:
    """List the images of a folder, of a torchvision data set, or of scikit-learn's digits.

    Classes are the folders right below `source`; but an image right in it means that the folder has
    no classes. In a folder of `images` and `masks`, `masks/<name>.png` holds the class of every
    pixel of `images/<name>.jpg`.

    Args:
        source: a folder, `cifar10` or another of torchvision's, or "digits".
        split: "train" for the training half of a torchvision data set, else its test half.
        download_to: torchvision's folder; what is missing is downloaded to it.
        labels: table of the classes of a folder's images; see `read_labels`.

    Raises:
        FileNotFoundError: no such folder or file, no images in it, or an image without its mask.
        UserError: another split of the digits than "train"; labels for something that is no folder,
            or for none of its images.
    """
    folder = Path(source)
    if labels and not folder.is_dir():
        raise UserError(f"--labels lists the classes of a folder's images, and {source} is none")
    if source == DIGITS:
        if split != "train":
            raise UserError(
                f"{DIGITS} has no split of its own; hold some of it out (--holdout 0.2)"
            )
        return _digits()
    if source in _TORCHVISION:
        return _torchvision(source, split, download_to or Path.home() / ".cache" / "torchvision")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source} is no folder; give a folder of images or of class folders, or one of "
            f"{', '.join((DIGITS, *_TORCHVISION))}"
        )
    if labels:
        return _labelled(folder, labels)
    below = {path.name for path in folder.iterdir() if path.is_dir()}
    if {"images", "masks"} <= below:
        return _masked(folder)
    images, others = _files(folder)
    if any(len(name.parts) == 1 for name in images):
        items = [Item(str(name), NO_LABEL, partial(Path, folder, name)) for name in images]
        return Source([], items, others)
    # Empty ones too: a class keeps its number in a split that has no image of it.
    classes = sorted(name for name in below if not name.startswith("."))
    label = {name: number for number, name in enumerate(classes)}
    items = [Item(str(name), label[name.parts[0]], partial(Path, folder, name)) for name in images]
    return Source(classes, items, others)


def refuse_splits(source: str, classes: list[str]) -> None:
    """Refuse to take folders of splits for classes.

    Raises:
        UserError: all folders are called as splits are.
    """
    if classes and _SPLITS.issuperset(classes):
        raise UserError(
            f"{source} holds splits, not classes: {', '.join(classes)}; give one of these folders, "
            "or put all into shards without classes by `famt shards --unlabelled`"
        )


def _files(folder: Path, labels: Path | None = None) -> tuple[list[Path], dict[str, int]]:
    """Image files below a folder, relative to it and sorted, and numbers of others by ending.

    Hidden files and the table of labels are left out.
    """
    images, others = [], Counter[str]()
    table = labels and labels.resolve()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if table and name == table.name and Path(parent, name).resolve() == table:
                continue
            if has_file_allowed_extension(name, IMG_EXTENSIONS):
                images.append(Path(parent, name).relative_to(folder))
            else:
                others[Path(name).suffix.lower()] += 1
    if not images:
        but = f", but {count_endings(others)}" if others else ""
        endings = ", ".join(IMG_EXTENSIONS)
        raise FileNotFoundError(f"{folder} holds no images{but}; images end in {endings}")
    return sorted(images), dict(others)


def _labelled(folder: Path, path: Path) -> Source:
    """Images whose classes are in a table."""
    images, others = _files(folder, path)
    labels = read_labels(path)
    classes = class_names(labels)
    number = {name: each for each, name in enumerate(classes)}
    found = {image: find_label(labels, image) for image in images}
    alike = Counter(image.name for image in images)
    for image, label in found.items():
        if label is not None and alike[image.name] > 1 and image.as_posix() not in labels:
            raise UserError(
                f"{path} does not say which of the {alike[image.name]} images {image.name} in "
                f"{folder} it means; name them as {image}"
            )
    unlisted = [str(image) for image, label in found.items() if label is None]
    if len(unlisted) == len(images):
        raise UserError(
            f"{path} lists none of the images in {folder}: it lists {next(iter(labels))}, for "
            f"example, and the folder holds {images[0]}"
        )
    items = [
        Item(str(image), NO_LABEL if label is None else number[label], partial(Path, folder, image))
        for image, label in found.items()
    ]
    return Source(classes, items, others, unlisted)


def _masked(folder: Path) -> Source:
    """Images with masks."""
    names, others = _files(folder / "images")
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
    """Whether a mask holds only 0 and 255, or can't be read."""
    try:
        return not np.setdiff1d(decode_mask(path.read_bytes()).numpy(), (0, 255)).size
    except UserError:
        return True


def _mask(image: Path, path: Path, binary: bool) -> bytes:
    """The PNG of a mask; in binary ones 255 becomes class 1."""
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


def _torchvision(source: str, split: str, root: Path | str) -> Source:
    half = "train" if split == "train" else "test"
    chosen = {"train": half == "train"} if source.startswith("cifar") else {"split": half}
    dataset = _TORCHVISION[source](root, download=True, **chosen)
    names = ("targets", "_labels", "labels")  # one of these, by data set
    targets = next(getattr(dataset, name) for name in names if hasattr(dataset, name))
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
        Item(f"digit-{number:04d}", int(label), partial(_digit, digits.images[number]))
        for number, label in enumerate(digits.target)
    ]
    return Source([str(digit) for digit in range(10)], items, {})


def _digit(values: np.ndarray) -> Image.Image:
    pixels = np.round(values / 16 * 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
