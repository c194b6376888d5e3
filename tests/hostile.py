"""Image files as broken programs, odd cameras and attackers write them, each kind by its name.

Every maker takes a `random.Random` and returns the bytes of one file. Its picture is `marked(...)`,
on which each of the eight orientations looks different.
"""

import struct
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image
from samples import encode

Maker = Callable[[Random], bytes]

ORIENTATION = 0x0112
BYTE, ASCII, SHORT, LONG, RATIONAL = 1, 2, 3, 4, 5
_SIZES = {BYTE: 1, ASCII: 1, SHORT: 2, LONG: 4, RATIONAL: 8}
_CODES = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "L"}


def marked(chance: Random, height: int = 40, width: int = 64) -> np.ndarray:
    """A grey slope with one bright object off its middle: `[height, width, 3]` uint8."""
    rows, columns = np.mgrid[0:height, 0:width]
    slope = 60 + 20 * rows / height + 10 * columns / width
    picture = np.repeat(slope[..., None], 3, axis=2).astype(np.uint8)
    colour = [chance.randrange(170, 256) for _ in range(3)]
    picture[height // 6 : height // 2, width // 8 : width // 3] = colour
    return picture


def picture(chance: Random, kind: str, **options: object) -> bytes:
    """`marked` in a file format."""
    return encode(marked(chance), kind, **options)


def exif(
    orientation: int,
    order: str = "<",
    kind: int = SHORT,
    count: int = 1,
    before: tuple[bytes, ...] = (),
    after: tuple[bytes, ...] = (),
) -> bytes:
    """A TIFF block with an Orientation, `before` and `after` it other entries of 12 bytes.

    Args:
        order: "<" or ">", little- or big-endian.
        kind, count: of the value, as the block states them.
    """
    size = _SIZES[kind]
    if kind == RATIONAL:
        value = struct.pack(order + "L", 8)
    else:
        value = struct.pack(order + _CODES[kind], orientation % (1 << 8 * size))
    entry = struct.pack(order + "HHL", ORIENTATION, kind, count) + value.ljust(4, b"\0")
    entries = [*before, entry, *after]
    start = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return start + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


def entry(order: str, tag: int, kind: int, count: int, value: int) -> bytes:
    """Another entry of a TIFF block."""
    return struct.pack(order + "HHLL", tag, kind, count, value)


def xmp(orientation: int) -> bytes:
    """An XMP packet with an Orientation."""
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf'
        b'-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % orientation
    )


def exif_game(chance: Random) -> bytes:
    """A TIFF block that decoders read in different ways."""
    order, turned = chance.choice("<>"), chance.randrange(2, 9)
    far = entry(order, 0x8769, LONG, 1, 1 << 30)
    text = entry(order, 0x010E, ASCII, 1 << 20, 1 << 20)
    plain = exif(turned, order)
    broken = bytearray(plain)
    for _ in range(chance.randrange(1, 4)):
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    games = [
        plain,
        exif(turned, order, BYTE),
        exif(turned, order, ASCII, 1),
        exif(turned, order, LONG),
        exif(turned, order, RATIONAL),
        *(exif(turned, order, count=count) for count in (0, 2, 1000)),
        *(exif(turned, order, after=(each,)) for each in (far, text)),
        *(exif(turned, order, before=(each,)) for each in (far, text)),
        exif(turned, order, after=(exif(chance.randrange(2, 9), order)[10:22],)),  # two
        exif(chance.choice((0, 9, 255, 65535)), order),
        plain.replace(struct.pack(order + "H", ORIENTATION), bytes(2), 1),  # none
        plain[: chance.randrange(len(plain))],
        bytes(broken),
        b"",
    ]
    return chance.choice(games)


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments put in right after its first marker."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def _app1(block: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + block)


def _app1_xmp(packet: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)


def _jpeg(chance: Random) -> bytes:
    return picture(chance, "JPEG", progressive=chance.random() < 0.3, quality=90)


def _jpeg_exif(chance: Random) -> bytes:
    return with_segments(_jpeg(chance), _app1(exif_game(chance)))


def _jpeg_exif_and_xmp(chance: Random) -> bytes:
    parts = [_app1(exif_game(chance)), _app1_xmp(xmp(chance.randrange(1, 9)))]
    chance.shuffle(parts)
    return with_segments(_jpeg(chance), *parts)


def _jpeg_xmp(chance: Random) -> bytes:
    return with_segments(_jpeg(chance), _app1_xmp(xmp(chance.randrange(2, 9))))


def _jpeg_two_exif(chance: Random) -> bytes:
    return with_segments(_jpeg(chance), *(_app1(exif_game(chance)) for _ in range(2)))


def _jpeg_late_exif(chance: Random) -> bytes:
    jpeg = _jpeg(chance)
    at = jpeg.index(chance.choice((b"\xff\xdb", b"\xff\xc4", b"\xff\xda")))
    return jpeg[:at] + _app1(exif(chance.randrange(2, 9))) + jpeg[at:]


def _jpeg_odd_prefix(chance: Random) -> bytes:
    prefix = chance.choice((b"Exif\0\xff", b"exif\0\0", b"Exif\0", b"EXIF\0\0", b"\0Exif\0\0"))
    return with_segments(_jpeg(chance), segment(0xE1, prefix + exif(chance.randrange(2, 9))))


def _jpeg_other_segments(chance: Random) -> bytes:
    block = exif(chance.randrange(2, 9))
    odd = [
        segment(0xE2, b"MPF\0" + block),
        segment(0xE2, b"ICC_PROFILE\0\x01\x01" + chance.randbytes(40)),
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x22\0\0\0\0\0\x20" + block),
        segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([chance.randrange(3)])),
        segment(0xEC, b"Ducky" + chance.randbytes(12)),
        segment(0xFE, b"a comment"),
        b"\xff" * chance.randrange(1, 4) + segment(0xFE, b"fill bytes"),
        segment(0xE0, b"JFXX\0\x10" + chance.randbytes(30)),
    ]
    return with_segments(_jpeg(chance), *chance.sample(odd, chance.randrange(1, 4)))


def _jpeg_colours(chance: Random) -> bytes:
    image = Image.fromarray(marked(chance))
    mode = chance.choice(("L", "CMYK", "RGB"))
    options = {"keep_rgb": True} if mode == "RGB" else {}
    jpeg = encode(image.convert(mode), "JPEG", quality=90, **options)
    if chance.random() < 0.5:
        return jpeg
    return with_segments(jpeg, _app1(exif(chance.randrange(1, 9))))


def lossless_jpeg(grey: np.ndarray) -> bytes:
    """A lossless (SOF3) JPEG of `[H, W]` uint8: each pixel's difference from its neighbour.

    ITU-T T.81, annex H, with predictor 1 and one table in which all categories have 4 bits.
    """
    height, width = grey.shape
    values = grey.astype(int)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 128
    bits = []
    for difference in (values - predicted).ravel().tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:04b}")
        if category:
            low = difference if difference > 0 else difference + (1 << category) - 1
            bits.append(f"{low:0{category}b}")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    table = bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)])
    return (
        b"\xff\xd8"
        + segment(0xC3, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\0")
        + segment(0xC4, table)
        + segment(0xDA, b"\x01\x01\0\x01\0\0")
        + scan
        + b"\xff\xd9"
    )


def _jpeg_lossless_grey(chance: Random) -> bytes:
    return lossless_jpeg(marked(chance)[..., 0])


def png_chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """(name, content) of each chunk of a PNG."""
    chunks, at = [], 8
    while at < len(png):
        length = struct.unpack(">L", png[at : at + 4])[0]
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def chunk(name: bytes, content: bytes, wrong: int = 0) -> bytes:
    """A chunk of a PNG, its CRC right unless `wrong`."""
    crc = zlib.crc32(name + content) ^ wrong
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", crc)


def join_png(chunks: list[bytes]) -> bytes:
    """A PNG of whole chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _png(chance: Random) -> list[bytes]:
    image = Image.fromarray(marked(chance))
    mode = chance.choice(("RGB", "RGB", "L", "P", "RGBA"))
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    return [chunk(*each) for each in png_chunks(encode(image, "PNG"))]


def _png_with(chance: Random, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks, each after the first or before the last."""
    whole = _png(chance)
    for each in chunks:
        whole.insert(chance.choice((1, len(whole) - 1)), chunk(*each))
    return join_png(whole)


def _png_exif(chance: Random) -> bytes:
    prefix = b"Exif\0\0" if chance.random() < 0.3 else b""
    return _png_with(chance, (b"eXIf", prefix + exif_game(chance)))


def _png_two_exif(chance: Random) -> bytes:
    blocks = exif(chance.randrange(1, 9)), exif(chance.randrange(1, 9), ">")
    return _png_with(chance, *((b"eXIf", block) for block in blocks))


def _png_raw_profile(chance: Random) -> bytes:
    block = b"Exif\0\0" + exif_game(chance)
    text = b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
    name = b"Raw profile type " + chance.choice((b"exif", b"APP1"))
    kinds = [(b"tEXt", name + b"\0" + text), (b"zTXt", name + b"\0\0" + zlib.compress(text))]
    return _png_with(chance, chance.choice(kinds))


def _png_xmp(chance: Random) -> bytes:
    content = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(chance.randrange(2, 9))
    return _png_with(chance, (b"iTXt", content))


def _png_animated(chance: Random) -> bytes:
    first = Image.fromarray(marked(chance))
    options = {"exif": b"Exif\0\0" + exif(chance.randrange(1, 9))} if chance.random() < 0.3 else {}
    frames = {"default_image": chance.random() < 0.7, "append_images": [first.transpose(1)]}
    return encode(first, "PNG", save_all=True, **frames, **options)


def _png_bad_crc(chance: Random) -> bytes:
    chunks = png_chunks(join_png(_png(chance)))
    bad = chance.choice([n for n, (name, _) in enumerate(chunks) if name == b"IDAT"])
    flip = 1 << chance.randrange(32)
    return join_png([chunk(*each, wrong=flip * (n == bad)) for n, each in enumerate(chunks)])


def _png_chunk_games(chance: Random) -> bytes:
    chunks = _png(chance)
    extra = chance.choice((b"ABCD", b"abcd", b"tRNS", b"PLTE", b"acTL", b"IDAT", b"gAMA", b"sRGB"))
    game = chance.randrange(6)
    at = chance.randrange(len(chunks))
    if game == 0:
        chunks.insert(chance.randrange(len(chunks) + 1), chunks[at])
    elif game == 1:
        del chunks[at]
    elif game == 2:
        chunks.insert(1, chunks[0])  # two headers
    elif game == 3:
        content = chance.randbytes(chance.randrange(20))
        chunks.insert(chance.randrange(1, len(chunks)), chunk(extra, content))
    elif game == 4:
        name, content = png_chunks(join_png(chunks))[at]
        chunks[at] = chunk(name, content, wrong=1 << chance.randrange(32))
    else:
        chance.shuffle(chunks)
    return join_png(chunks)


def _png_deep(chance: Random) -> bytes:
    deep = marked(chance)[..., 0].astype(np.uint16) * 257
    return encode(Image.fromarray(deep), "PNG")


def riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(
        name + struct.pack("<L", len(content)) + content + bytes(len(content) % 2)
        for name, content in chunks
    )
    return b"RIFF" + struct.pack("<L", 4 + len(body)) + b"WEBP" + body


def webp_chunks(chance: Random, height: int = 40, width: int = 64) -> list[tuple[bytes, bytes]]:
    """Of an extended WebP with metadata to come."""
    lossless = chance.random() < 0.3
    simple = encode(marked(chance, height, width), "WEBP", lossless=lossless, quality=90)
    length = struct.unpack("<L", simple[16:20])[0]
    extent = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return [(b"VP8X", bytes([8, 0, 0, 0]) + extent), (simple[12:16], simple[20 : 20 + length])]


def _webp_exif(chance: Random) -> bytes:
    chunks = webp_chunks(chance)
    prefix = b"Exif\0\0" if chance.random() < 0.4 else b""
    chunks.insert(chance.choice((1, 2, 2)), (b"EXIF", prefix + exif_game(chance)))
    return riff(chunks)


def hide_exif(webp: bytes, block: bytes, how: str) -> bytes:
    """An extended WebP with EXIF that the parser of DALI does not find, and its decoder does."""
    late = b"EXIF" + struct.pack("<L", len(block)) + block
    if how == "beyond":  # the RIFF's end
        return webp + late
    if how == "across":  # it
        webp += late
        return webp[:4] + struct.pack("<L", len(webp) - 10) + webp[8:]
    body = webp[12:] + b"ABCD" + struct.pack("<L", 3) + b"odd" + late  # after no padding
    return b"RIFF" + struct.pack("<L", 4 + len(body)) + b"WEBP" + body


def _webp_late_exif(chance: Random) -> bytes:
    webp = riff(webp_chunks(chance, *chance.choice(((40, 64), (64, 40), (48, 48)))))
    block = exif(chance.randrange(1, 9), chance.choice("<>"))
    return hide_exif(webp, block, chance.choice(("beyond", "across", "unpadded")))


def _webp_games(chance: Random) -> bytes:
    chunks = webp_chunks(chance)
    flags = chance.choice((0, 4, 8, 12, 255))
    chunks[0] = (b"VP8X", bytes([flags]) + chunks[0][1][1:])
    extra = [
        (b"EXIF", exif(chance.randrange(1, 9))),
        (b"EXIF", exif(chance.randrange(1, 9), ">")),
        (b"XMP ", xmp(chance.randrange(2, 9))),
        (b"ICCP", chance.randbytes(24)),
        (b"ABCD", chance.randbytes(9)),
    ]
    for each in chance.sample(extra, chance.randrange(1, 4)):
        chunks.insert(chance.randrange(1, len(chunks) + 1), each)
    return riff(chunks)


def png_extent(png: bytes, height: int, width: int) -> bytes:
    """A PNG whose header states another extent, its CRC right."""
    (name, header), *chunks = png_chunks(png)
    header = struct.pack(">LL", width, height) + header[8:]
    return join_png([chunk(*each) for each in ((name, header), *chunks)])


def _odd_extent(chance: Random) -> bytes:
    """Of a JPEG, PNG or WebP: bits of the extent that its header states are flipped."""
    kind = chance.choice(("JPEG", "PNG", "WEBP"))
    data = riff(webp_chunks(chance)) if kind == "WEBP" else picture(chance, kind)
    extent = [40, 64]
    bits = {"JPEG": 16, "PNG": 32, "WEBP": 24}[kind]
    extent[chance.randrange(2)] ^= 1 << chance.choice((chance.randrange(bits), bits - 1))
    if kind == "PNG":
        return png_extent(data, *extent)
    if kind == "WEBP":
        height, width = ((side - 1 & 0xFFFFFF).to_bytes(3, "little") for side in extent)
        return data[:24] + width + height + data[30:]
    at = data.index(b"\xff\xc0")  # the frame of a baseline JPEG
    return data[: at + 5] + struct.pack(">HH", *extent) + data[at + 9 :]


def _tall(chance: Random) -> bytes:
    """One to twenty pixels wide, and from 60,000 to 300,000 high, or the other way round."""
    extent = [chance.choice((60_000, 65_535, 65_536, 270_000, 300_000)), chance.choice((1, 2, 20))]
    if chance.random() < 0.3:
        extent.reverse()
    return encode(Image.new("L", (extent[1], extent[0]), 80), "PNG")


def _webp_animated(chance: Random) -> bytes:
    first = Image.fromarray(marked(chance))
    return encode(first, "WEBP", save_all=True, append_images=[first.transpose(1)])


METADATA: dict[str, Maker] = {
    maker.__name__.lstrip("_"): maker
    for maker in (
        _jpeg_exif,
        _jpeg_exif_and_xmp,
        _jpeg_xmp,
        _jpeg_two_exif,
        _jpeg_late_exif,
        _jpeg_odd_prefix,
        _jpeg_other_segments,
        _jpeg_colours,
        _png_exif,
        _png_two_exif,
        _png_raw_profile,
        _png_xmp,
        _png_animated,
        _png_deep,
        _webp_exif,
        _webp_late_exif,
        _webp_games,
        _webp_animated,
    )
}
"""Whole images whose metadata decoders read in different ways."""

STRUCTURE: dict[str, Maker] = {
    maker.__name__.lstrip("_"): maker
    for maker in (_jpeg_lossless_grey, _png_bad_crc, _png_chunk_games, _odd_extent, _tall)
}
"""Images that some decoders refuse and others do not."""
