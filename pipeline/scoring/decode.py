"""Decode an image ahead of training as training will decode it, or reject it with a reason.

DALI reads images with nvImageCodec, and one that it can't decode ends the epoch. So nvImageCodec
decides whether an image decodes, and its orientation. For plain JPEGs Pillow's scaled decode gives
the same verdict and picture at a fraction of the cost, unless much of the picture is clipped.
"""

from __future__ import annotations

import io
import os
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from famt.pipeline.scoring.exif_orientation import is_ambiguous, may_be_turned, may_turn

# nvImageCodec logs each image that it refuses; the quarantine has the reasons.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
from nvidia import nvimgcodec

_MAX_PIXELS = 100_000_000
_MAX_SIDE = 65_535  # JPEG's own; DALI draws crops outside of images above some 262,000 px high
_CODECS = ("jpeg", "png", "webp")
_KNOWN = "JPEG, PNG or WebP"
# Above 256 scans nvImageCodec decodes progressive JPEGs with another library; encoders write 10.
_MAX_PLAIN_SCANS = 100
# Scaling averages values beyond black and white before it clips them, a whole decode after.
_MAX_CLIPPED = 0.1
# A decoder's peak: RGB, its turned copy, and a progressive JPEG's coefficients.
_BYTES_PER_PIXEL = 16

_START, _SCAN, _METADATA, _APP2 = 0xD8, 0xDA, 0xE1, 0xE2
_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman-coded: baseline, extended, progressive
_QUANTISATION = 0xDB
_TABLES = (0xC4, 0xDD, 0xFE)  # Huffman, restart interval, comment
_MAX_STEP = 4  # times a quantisation table's median; encoders write 2.4 and less


class BadImage(ValueError):
    """An image that can't enter training; the message has the reason."""


def decode(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode an image upright, as training will, to RGB squashed to `[size, size, 3]` uint8.

    A plain JPEG is decoded at the smallest DCT scale (1, 1/2, 1/4, 1/8) that gives at least `size`
    px; whole, with DALI's library, any other image, and a plain JPEG of which more than a tenth is
    clipped, as in most whose data is damaged.

    Raises:
        BadImage: undecodable, cut off, neither JPEG, PNG nor WebP, or too large.
        MemoryError: too little memory to decode it, which is no verdict on the image.
    """
    extent = plain_jpeg_extent(data)
    scaled = None if extent is None else _decode_scaled(data, extent, size)
    image = _decode_whole(data) if scaled is None else scaled
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def plain_jpeg_extent(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a plain JPEG, on which all decoders agree; None for any other image.

    Plain means 8 bits, Huffman-coded, grey or three colours, well-formed segments up to the first
    scan, quantisation tables without a step that sticks out, and no metadata that could turn it
    (EXIF, in APP1) or hold further images (MPF, in APP2).
    """
    if data[:2] != bytes((0xFF, _START)):
        return None
    extent, progressive, at = None, False, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == _SCAN:
            scans = data.count(bytes((0xFF, _SCAN))) if progressive else 1
            return extent if scans <= _MAX_PLAIN_SCANS else None
        if marker in _FRAMES:
            # Precision, height, width, components; then three bytes a component.
            precision, components = segment[:1], segment[5:6]
            is_plain = (length, components) in ((11, b"\x01"), (17, b"\x03"))
            if extent or precision != b"\x08" or not is_plain:
                return None
            extent = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            progressive = marker == _FRAMES[-1]
        elif marker == _QUANTISATION:
            if not _are_plain_tables(segment):
                return None
        elif marker == _APP2:
            if not segment.startswith(b"ICC_PROFILE\0"):
                return None
        elif marker == _METADATA:
            if may_turn(segment):
                return None
        elif not (marker in _TABLES or 0xE0 <= marker <= 0xEF):
            return None
        if length < 2:
            return None
        at += 2 + length
    return None


def _are_plain_tables(segment: bytes) -> bool:
    """Whether quantisation tables have 8 bits, and no step that only a whole decode would show."""
    tables = [segment[at + 1 : at + 65] for at in range(0, len(segment), 65)]
    return all(
        segment[65 * n] < 16 and len(steps) == 64 and max(steps) <= _MAX_STEP * sorted(steps)[32]
        for n, steps in enumerate(tables)
    )


def _decode_scaled(data: bytes, extent: tuple[int, int], size: int) -> Image.Image | None:
    """None if so much is clipped that a whole decode may differ."""
    _check_extent(*extent)
    stream = _parse(data)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            _check_agreement(stream, image.size[::-1], turned=False)
            image.draft("RGB", (size, size))
            is_scaled = image.size[::-1] != extent
            if is_scaled and _share_clipped(image) > _MAX_CLIPPED:
                return None
            return image.convert("RGB")
    except OSError as error:
        _prove_memory(*extent)
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _share_clipped(image: Image.Image) -> float:
    """Share of pixels with a channel at an end of its range; in colour, but for black and white.

    Of 32 x 32 pixels.
    """
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.NEAREST))
    if pixels.ndim == 2:
        return float(((pixels == 0) | (pixels == 255)).mean())
    red, green, blue = np.moveaxis(pixels, -1, 0)
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    return float((((low == 0) | (high == 255)) & (low < high)).mean())


def _decode_whole(data: bytes) -> Image.Image:
    stream = _parse(data)
    if stream.codec_name not in _CODECS:
        raise BadImage(f"it is a {stream.codec_name}, not a {_KNOWN}")
    _check_extent(stream.height, stream.width)
    if stream.codec_name == "png" and b"acTL" in data[: data.find(b"IDAT")]:
        raise BadImage("it is an animated PNG; DALI can't decode some of them")
    if is_ambiguous(data):
        raise BadImage("readers may disagree on its EXIF orientation; save the image again")
    decoded = _decoder().decode(stream)
    if decoded is None:
        _prove_memory(stream.height, stream.width)
        raise BadImage(f"DALI can't decode this {stream.codec_name}")
    pixels = np.asarray(decoded.cpu())
    _check_agreement(stream, pixels.shape[:2], turned=may_be_turned(data))
    return Image.fromarray(pixels)


def _parse(data: bytes) -> nvimgcodec.CodeStream:
    """An image's headers by nvImageCodec.

    It refuses what Pillow may skip, such as stray bytes between the segments of a JPEG.
    """
    try:
        stream = nvimgcodec.CodeStream(data)
        _ = stream.width
    except RuntimeError as error:
        raise BadImage(
            f"it is not a {_KNOWN}, or DALI can't parse its headers ({error})"
        ) from error
    return stream


_own = threading.local()


def _decoder() -> nvimgcodec.Decoder:
    """This thread's decoder, with one CPU thread and the plugins of DALI's CPU decoders."""
    if not hasattr(_own, "decoder"):
        _own.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )
    return _own.decoder


def _check_extent(height: int, width: int) -> None:
    if min(height, width) < 1:  # or so large that it overflows
        raise BadImage(f"{width} x {height} px is not a valid image size")
    if max(height, width) > _MAX_SIDE or height * width > _MAX_PIXELS:
        raise BadImage(f"{width} x {height} px is too large")


def _check_agreement(stream: nvimgcodec.CodeStream, found: tuple[int, ...], turned: bool) -> None:
    """Refuse an image whose pixels have another extent than its headers. DALI crops by the headers.

    Args:
        turned: height and width may be swapped.
    """
    announced = stream.height, stream.width
    if found != announced and not (turned and found[::-1] == announced):
        raise BadImage(
            f"its headers announce {announced} px (height, width), but it decodes to {found}"
        )


def _prove_memory(height: int, width: int) -> None:
    """Raise a MemoryError if an image of this extent can't be decoded here.

    Both decoders report a lack of memory as a bad image.
    """
    np.empty(height * width * _BYTES_PER_PIXEL, np.uint8)
