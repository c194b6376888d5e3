"""Write images and their classes into webdataset shards, in shuffled order."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import obstore
import webdataset
from PIL import Image, ImageOps

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.options import Encoding
from famt.pipeline.shards import IMAGE_EXTENSIONS, MASK_EXTENSION, NO_LABEL
from famt.pipeline.sources import Item


@dataclass(frozen=True)
class Written:
    """Names of shards, how many samples they hold, and (name, reason) of each image skipped."""

    shards: list[str]
    samples: int
    skipped: list[tuple[str, str]]


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

    A shard appears under its name only when it is whole. Equal items and seeds give equal bytes, so
    the score cache recognises them. An image that can't be read is skipped and reported.

    Args:
        items: images to write.
        out: local folder or object-store URL; made if it does not exist.
        split: prefix of the shards' names.
        samples_per_shard: the last shard may hold fewer.
        on_sample: called after each item.

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


def safe_key(name: str) -> str:
    """A name without its suffix, all but ASCII letters, digits, `-` and `_` replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name.rpartition(".")[0] or name)


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
