"""Classes of images from a table, as data sets bring along."""

from __future__ import annotations

import csv
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from famt.pipeline.errors import UserError

_NAMES = ("file_name", "filename", "file", "image", "image_id", "path", "name", "id")
_CLASSES = ("label", "class", "category", "class_name", "target")


def read_labels(path: Path) -> dict[str, str]:
    """Image name -> class, from a CSV file separated by commas, semicolons or tabs.

    A header names the two columns, such as `file_name` and `label` in the `metadata.csv` of Hugging
    Face's image folders. Without a header they are the first two, as in Tiny ImageNet's
    `val_annotations.txt`.

    Raises:
        FileNotFoundError: no such file.
        UserError: no text, no such columns, a row without a class, or an image with two classes.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {error}") from None
    first = text.partition("\n")[0]
    delimiter = next((each for each in "\t,;" if each in first), ",")
    lines = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    rows = [row for row in lines if row]
    name, label, start = 0, 1, 0
    if rows and not any(has_file_allowed_extension(cell, IMG_EXTENSIONS) for cell in rows[0]):
        columns, start = [cell.strip().lower() for cell in rows[0]], 1
        try:
            name = next(columns.index(each) for each in _NAMES if each in columns)
            label = next(columns.index(each) for each in _CLASSES if each in columns)
        except StopIteration:
            raise UserError(
                f"{path} has the columns {', '.join(rows[0])}; one of {', '.join(_NAMES)} must "
                f"name the image, and one of {', '.join(_CLASSES)} its class"
            ) from None
    found: dict[str, str] = {}
    for number, row in enumerate(rows[start:], start=start + 1):
        cells = [row[each].strip() if each < len(row) else "" for each in (name, label)]
        cells[0] = cells[0].removeprefix("./")
        if not all(cells):
            raise UserError(f"{path}, row {number}: no image or no class")
        if found.setdefault(*cells) != cells[1]:
            raise UserError(f"{path}, row {number}: {cells[0]} has the class {found[cells[0]]} too")
    if not found:
        raise UserError(f"{path} lists no images")
    return found


def class_names(labels: dict[str, str]) -> list[str]:
    """All classes, sorted; by value if all are numbers."""
    names = set(labels.values())
    return sorted(names, key=int) if all(each.isdecimal() for each in names) else sorted(names)


def find_label(labels: dict[str, str], image: Path) -> str | None:
    """The class of an image, by its relative path, its name, or its stem."""
    keys = (image.as_posix(), image.name, image.stem)
    return next((labels[key] for key in keys if key in labels), None)
