"""Find EXIF whose orientation readers may understand in different ways.

nvImageCodec reads an image's orientation twice: in its parser, which computes the upright extent,
and in its decoder, which turns the pixels. If the two differ, DALI ends the epoch or writes past
the end of the image, and the process may crash later. Such a file must not even be decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_ORIENTATION = 0x0112
_KIND_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_EXIF = b"Exif\0\0"


def is_ambiguous(data: bytes) -> bool:
    """Whether readers may disagree on the orientation of this JPEG, PNG or WebP.

    They agree on an image without EXIF, with one well-formed block, or with blocks that no reader
    can take for an orientation other than upright.
    """
    blocks = _blocks(data)
    if len(blocks) == 1 and _is_well_formed(blocks[0]):
        return False
    return any(map(may_turn, blocks))


def may_be_turned(data: bytes) -> bool:
    """Whether any reader could turn this JPEG, PNG or WebP."""
    return any(map(may_turn, _blocks(data)))


def _blocks(data: bytes) -> list[bytes]:
    """All bytes that some reader could take for the EXIF of an image."""
    if data[:2] == b"\xff\xd8":
        return list(_jpeg_blocks(data))
    return _webp_blocks(data) if data[:4] == b"RIFF" else list(_png_blocks(data))


def _jpeg_blocks(data: bytes) -> Iterator[bytes]:
    """The EXIF of each APP1 segment before the first scan; the whole file if its headers break."""
    at = 2
    while True:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xff\xda":
            return
        if marker[:1] != b"\xff" or length < 2:
            yield data
            return
        segment = data[at + 4 : at + 2 + length]
        if marker == b"\xff\xe1" and segment.startswith(_EXIF):
            yield segment[len(_EXIF) :]
        at += 2 + length


def _png_blocks(data: bytes) -> Iterator[bytes]:
    """Each eXIf chunk."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            yield data[at + 8 : at + 8 + length]
        at += 12 + length


def _webp_blocks(data: bytes) -> list[bytes]:
    """Each EXIF chunk; the whole file if "EXIF" also occurs elsewhere, as past the RIFF's end."""
    blocks, at = [], 12
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= end:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        following = at + 8 + length + length % 2
        if data[at : at + 4] == b"EXIF" and following <= end:
            blocks.append(data[at + 8 : at + 8 + length])
        at = following
    return blocks if len(blocks) == data.count(b"EXIF") else [data]


def _is_well_formed(block: bytes) -> bool:
    """Whether a TIFF block holds its first directory and all that it points at."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 10:
        return False
    (start,) = struct.unpack(order + "L", block[4:8])
    if start + 2 > len(block):
        return False
    (count,) = struct.unpack(order + "H", block[start : start + 2])
    end = start + 2 + 12 * count
    if end > len(block):
        return False
    tags = []
    entries = struct.iter_unpack(order + "HHLL", block[start + 2 : end])
    for tag, kind, values, offset in entries:
        size = _KIND_BYTES.get(kind, len(block)) * values
        # A pointer to another directory has 4 bytes, but is an offset all the same.
        if (size > 4 or tag == 0x8769) and offset + (size if size > 4 else 2) > len(block):
            return False
        tags.append(tag)
    return tags.count(_ORIENTATION) <= 1


def may_turn(block: bytes) -> bool:
    """Whether anything in a block could be read as an Orientation other than 1, upright."""
    for order in "<>":
        tag = struct.pack(order + "H", _ORIENTATION)
        upright = tag + struct.pack(order + "HLH", 3, 1, 1)
        if block.count(tag) > block.count(upright):
            return True
    return False
