"""Score one shard: the pure kernel under the Ray job, and the only judge of what enters training.

One read of the tar serves its hash, its table, every decode and every score.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import nvimgcodec
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline import storage
from pipeline.cache import ScoreCache, ShardTable
from pipeline.scores import ScoreSpec
from pipeline.shards import Rejected, Sample, content_id, list_shard

_BATCH = 128  # enough to share the cost of a call
_MAX_PIXELS = 100_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")  # what Pillow and DALI both decode
Image.init()  # Pillow knows WebP only then


@dataclass(frozen=True)
class ShardScores:
    """Result of scoring one tar: its table and `maps [n, G, G]` float16, one a sample kept."""

    table: ShardTable
    maps: NDArray[np.float16]


@dataclass(frozen=True)
class ShardReport:
    """What one task did with one tar.

    Attributes:
        version: size and stamp of the file as it was read.
        kept, quarantined: samples; together all that were seen.
        decoded: images decoded now; 0 if the cache had it all.
    """

    url: str
    shard_id: str
    version: storage.Version
    kept: int
    quarantined: int
    decoded: int
    damage: str | None


class BadImage(ValueError):
    """An image that can't enter training; the message says why."""


def precompute_shard(url: str, cache: ScoreCache, spec: ScoreSpec) -> ShardReport:
    """Make the cache hold the table and the maps of the tar at `url`; compute only what it lacks.

    Raises:
        OSError: the tar can't be read, or the cache can't be written.
        ValueError: the file is no tar.
    """
    before = storage.version(url)
    data = storage.read(url)
    if storage.version(url) != before or len(data) != before.size:
        raise OSError(f"{url} changed while it was read; run again when nothing writes to it")
    shard_id = content_id(data)
    decoded = 0
    if not cache.has_entry(shard_id, spec):
        # A table that is there decides which samples there are: its other maps go by it.
        known = cache.read_table(shard_id) if cache.has_entry(shard_id, None) else None
        scored = score_shard(data, spec, url, known)
        cache.write(shard_id, scored.table, spec, scored.maps)
        decoded = len(scored.maps)
    table = cache.read_table(shard_id)
    return ShardReport(
        url, shard_id, before, len(table.label), len(table.rejected), decoded, table.damage
    )


def score_shard(
    data: bytes, spec: ScoreSpec, name: str = "tar", table: ShardTable | None = None
) -> ShardScores:
    """Decode and score every image of a tar in memory.

    Args:
        data: the bytes of the tar.
        spec: which score.
        name: what to call the tar in an error.
        table: score just these samples, which an earlier call on the same bytes kept.

    Raises:
        ValueError: `data` is not a tar, holds no image at all, or a sample of `table` does not
            decode any more.
    """
    samples, rejected, damage = _samples(data, name, table)
    kept: list[Sample] = []
    maps: list[torch.Tensor] = []
    batch: list[NDArray[np.uint8]] = []

    def score_batch() -> None:
        maps.append(spec.score(torch.from_numpy(np.stack(batch))))
        batch.clear()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that does no harm
        for sample in samples:
            try:
                batch.append(decode(data[sample.offset : sample.offset + sample.size], spec.size))
            except BadImage as error:
                if table is not None:
                    raise ValueError(
                        f"{name}: {sample.key} was kept before and does not decode now ({error}); "
                        "score with the Pillow that scored it first, or into another cache"
                    ) from error
                rejected.append(Rejected(sample.key, str(error)))
                continue
            kept.append(sample)
            if len(batch) == _BATCH:
                score_batch()
    if batch:
        score_batch()
    stacked = torch.cat(maps) if maps else torch.empty(0, spec.grid, spec.grid)
    new = ShardTable(
        key=[sample.key for sample in kept],
        offset=np.array([sample.offset for sample in kept], np.int64),
        size=np.array([sample.size for sample in kept], np.int64),
        label=np.array([sample.label for sample in kept], np.int64),
        rejected=sorted(rejected, key=lambda bad: bad.key),
        bytes=len(data),
        damage=damage,
    )
    return ShardScores(table or new, stacked.to(torch.float16).numpy())


def _samples(
    data: bytes, name: str, table: ShardTable | None
) -> tuple[list[Sample], list[Rejected], str | None]:
    if table is not None:
        rows = zip(table.key, table.offset, table.size, table.label, strict=True)
        return [Sample(k, int(o), int(s), int(c)) for k, o, s, c in rows], [], table.damage
    listing = list_shard(data)
    if not listing.samples and not listing.rejected:
        raise ValueError(f"{name}: no image in it ({listing.damage or 'the tar itself is whole'})")
    return listing.samples, list(listing.rejected), listing.damage


def decode(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode an image upright, as RGB, squashed to `[size, size, 3]` uint8.

    A JPEG is decoded at the smallest DCT scale (1, 1/2, 1/4, 1/8) that is still at least `size`.

    Raises:
        BadImage: undecodable, cut off, of a format that DALI does not read, or absurdly large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} px is absurdly large")
            if image.format == "WEBP" and data[12:16] == b"VP8X":
                raise BadImage("extended WebP (alpha, animation or metadata) is not supported")
            if image.mode.startswith(("I", "F")):
                raise BadImage(f"{image.mode} pixels of more than 8 bits are not supported")
            image.draft("RGB", (size, size))
            # Pillow would also turn an image by its XMP; DALI and torchvision go by EXIF alone.
            for xmp in ("xmp", "XML:com.adobe.xmp"):
                image.info.pop(xmp, None)
            if "exif" in image.info or image.format == "PNG":  # a PNG may carry it at its end
                ImageOps.exif_transpose(image, in_place=True)
            upright = image if image.mode == "RGB" else image.convert("RGB")
            small = upright.resize((size, size), Image.Resampling.BOX)
        _check_with_dalis_parser(data)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"no {', '.join(_FORMATS)} image") from None
    except (
        Exception
    ) as error:  # decoders raise anything on hostile bytes; each is the image's fault
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return np.asarray(small)


def _check_with_dalis_parser(data: bytes) -> None:
    """Let the library that DALI reads images with judge the headers.

    It refuses stray bytes between the segments of a JPEG, which Pillow skips: of 1,309 damaged
    photos that Pillow accepted it refused 25, the same 25 that ended a DALI pipeline.
    """
    try:
        _ = nvimgcodec.CodeStream(data).width
    except RuntimeError as error:
        raise BadImage(f"DALI can't parse its headers ({error})") from error
