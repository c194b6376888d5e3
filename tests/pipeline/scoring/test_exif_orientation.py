import struct
from random import Random

import pytest
from hostile import (
    LONG,
    chunk,
    entry,
    exif,
    hide_exif,
    join_png,
    picture,
    png_chunks,
    riff,
    segment,
    webp_chunks,
    with_segments,
)

from famt.pipeline.scoring.exif_orientation import is_ambiguous, may_be_turned

JPEG = picture(Random(0), "JPEG")
PNG = [chunk(*each) for each in png_chunks(picture(Random(0), "PNG"))]


def _jpeg(*blocks: bytes) -> bytes:
    return with_segments(JPEG, *(segment(0xE1, b"Exif\0\0" + block) for block in blocks))


def _png(*blocks: bytes) -> bytes:
    return join_png([PNG[0], *(chunk(b"eXIf", block) for block in blocks), *PNG[1:]])


def _webp(*blocks: bytes) -> bytes:
    return riff([*webp_chunks(Random(0)), *((b"EXIF", block) for block in blocks)])


FAR = entry("<", 0x8769, LONG, 1, 1 << 30)
NEAR = entry("<", 0x8769, LONG, 1, 8)


@pytest.mark.parametrize("file", [_jpeg, _png, _webp])
@pytest.mark.parametrize(
    ("blocks", "ambiguous"),
    [
        ((), False),
        ((exif(6),), False),
        ((exif(6, ">"),), False),
        ((exif(6, after=(NEAR,)),), False),
        ((exif(1), exif(1)), False),
        ((exif(1, after=(FAR,)),), False),
        ((exif(6), exif(6)), True),
        ((exif(1), exif(6)), True),
        ((exif(6, after=(FAR,)),), True),
        ((exif(6, count=1000),), True),
        ((exif(6, after=(exif(3)[10:22],)),), True),
        ((exif(6)[:15],), True),
        ((exif(1)[:15],), True),
        ((exif(6).replace(b"II", b"IM"),), True),
        ((b"",), False),
        ((b"no tiff",), False),
    ],
)
def test_only_one_well_formed_block_may_turn_an_image(file, blocks, ambiguous):
    assert is_ambiguous(file(*blocks)) == ambiguous


@pytest.mark.parametrize("file", [_jpeg, _png, _webp])
def test_one_block_that_all_read_alike_may_still_turn_an_image(file):
    assert may_be_turned(file(exif(6)))
    assert not may_be_turned(file(exif(1)))
    assert not may_be_turned(file())


@pytest.mark.parametrize("how", ["beyond", "across", "unpadded"])
def test_exif_off_the_chunks_of_a_webp_is_ambiguous_if_it_could_turn_it(how):
    whole = riff(webp_chunks(Random(0)))
    assert is_ambiguous(hide_exif(whole, exif(6), how))
    assert not is_ambiguous(hide_exif(whole, exif(1), how))
    assert is_ambiguous(hide_exif(_webp(exif(6)), exif(1), how))


def test_a_jpeg_whose_segments_break_off_is_ambiguous_if_anything_in_it_could_turn_it():
    assert not is_ambiguous(JPEG[:20] + b"stray" + JPEG[20:])
    turned = _jpeg(exif(6))
    assert is_ambiguous(turned[:-300].replace(b"\xff\xdb", b"\0\0"))


def test_fill_bytes_before_a_marker_hide_nothing():
    first, second = (segment(0xE1, b"Exif\0\0" + exif(turned)) for turned in (6, 3))
    assert is_ambiguous(with_segments(JPEG, first, b"\xff\xff\xff" + second))


def test_a_chunk_length_beyond_the_file_ends_the_search():
    cut = PNG[0] + struct.pack(">L", 1 << 31) + b"tEXt"
    assert not is_ambiguous(b"\x89PNG\r\n\x1a\n" + cut)
