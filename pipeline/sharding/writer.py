"""Write images and their classes into webdataset shards, in shuffled order."""

from __future__ import annotations

import errno
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import obstore
import webdataset
from PIL import Image, ImageOps

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.options import Encoding
from famt.pipeline.sharding.shards import IMAGE_EXTENSIONS, MASK_EXTENSION, NO_LABEL
from famt.pipeline.sharding.sources import Item

_16_BITS, _GREY, _WITH_ALPHA = b"\x10", b"\x00", (b"\x04", b"\x06")
_DARK_16_BITS = 4096  # below a sixteenth of the range: values of 12 bits, say


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        shards: their names.
        samples: number of images in them.
        skipped: (name, reason) of each image left out.
        transparent: number of images with an alpha channel, which decoders drop.
    """

    shards: list[str]
    samples: int
    skipped: list[tuple[str, str]]
    transparent: int = 0


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
        out: local folder or object-store URL; made if it does not exist.
        split: prefix of the shards' names.
        on_sample: called after each item.

    Raises:
        FileExistsError: `out` has shards of this split already.
        OSError: TMPDIR has no room for a tar.
    """
    store = storage.open_store(out, create=True)
    taken = obstore.list_with_delimiter(store)["objects"]
    if any(re.fullmatch(rf"{re.escape(split)}-\d{{6}}\.tar", meta["path"]) for meta in taken):
        raise FileExistsError(f"{out} has {split} shards already; remove them or choose another")
    shards: list[str] = []
    skipped: list[tuple[str, str]] = []
    transparent = 0

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
        try:
            for number in np.random.default_rng(seed).permutation(len(items)).tolist():
                item = items[number]
                try:
                    extension, data, alpha = _encode(item.load(), encoding)
                    mask = {MASK_EXTENSION: item.mask()} if item.mask else {}
                except (OSError, ValueError, UserError, Image.DecompressionBombError) as error:
                    skipped.append((item.name, storage.reason(error)))
                else:
                    key = f"{number:08d}-{safe_key(item.name)}"
                    label = {} if item.label == NO_LABEL else {"cls": str(item.label).encode()}
                    writer.write({"__key__": key, extension: data, **label, **mask})
                    transparent += alpha
                on_sample()
            writer.close()
        except OSError as error:
            with suppress(OSError, AttributeError):  # else its collection prints a traceback
                writer.tarstream.close()
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"no room in {scratch} for a whole tar: set TMPDIR to a folder with more, or lower "
                "--samples-per-shard"
            ) from error
    return Written(shards, len(items) - len(skipped), skipped, transparent)


def safe_key(name: str) -> str:
    """A name without its suffix, all but ASCII letters, digits, `-` and `_` replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name.rpartition(".")[0] or name)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An image of at most 8 bits a channel; 16-bit grey is scaled by its full range, 65535."""
    if not image.mode.startswith(("I", "F")):
        return image
    if not image.mode.startswith("I;16"):
        raise UserError(
            f"{image.mode} pixels have no known range; scale them to 16 bits, 0 to 65535, or to 8"
        )
    values = np.asarray(image).astype(np.int64)
    if values.max() < _DARK_16_BITS:
        raise UserError(
            f"its 16-bit pixels end at {values.max()} of 65535 and would be almost black; scale "
            "them to the full range"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _encode(source: Path | Image.Image, encoding: Encoding) -> tuple[str, bytes, bool]:
    """Extension and bytes of an image as it goes into a tar, and whether it has an alpha channel.

    The alpha channel of a WebP that is stored as it is goes unnoticed.
    """
    alpha = False
    if isinstance(source, Path):
        suffix = source.suffix.lower().lstrip(".")
        if suffix in IMAGE_EXTENSIONS and encoding.max_side is None:
            data = source.read_bytes()
            # Of a PNG's first chunk: 16 bits a channel or fewer, and the kind of colours.
            depth, colours = data[24:25], data[25:26]
            if suffix != "png" or (depth, colours) != (_16_BITS, _GREY):
                return suffix, data, suffix == "png" and colours in _WITH_ALPHA
        with Image.open(source) as opened:
            alpha = opened.has_transparency_data
            image = _in_8_bits(ImageOps.exif_transpose(opened)).convert("RGB")
        lossless = suffix not in ("jpg", "jpeg", "webp") and encoding.max_side is None
    else:
        image, lossless = source, encoding.max_side is None
    if encoding.max_side is not None:
        image.thumbnail((encoding.max_side, encoding.max_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue(), alpha
    image.save(buffer, "JPEG", quality=encoding.quality)
    return "jpg", buffer.getvalue(), alpha
