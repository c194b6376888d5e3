"""Tars as broken writers, cut transfers and attackers leave them, each kind by its name.

A maker takes a `random.Random` and images with their classes, and returns the bytes of a tar.
"""

import io
import tarfile
from collections.abc import Callable
from random import Random

from samples import tar_bytes

Labelled = list[tuple[str, bytes, int]]
"""key, image and class of each sample"""
Maker = Callable[[Random, Labelled], bytes]


def members(samples: Labelled) -> list[tuple[str, bytes]]:
    """An image and a class file of each sample."""
    return [
        member
        for key, image, label in samples
        for member in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode()))
    ]


def header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A tar header, its checksum right, with any bytes as the size."""
    head = bytearray(512)
    head[: len(name)], head[124:136], head[156:157] = name, size.ljust(12, b"\0"), kind
    head[157 : 157 + len(link)], head[257:265] = link, b"ustar\00000"
    head[148:156] = b"%06o\0 " % (sum(head) + 8 * ord(" "))
    return bytes(head)


def extension(records: bytes) -> bytes:
    """A PAX extension header for the next member."""
    padding = bytes(-len(records) % 512)
    return header(b"pax", b"%011o" % len(records), b"x") + records + padding


def record(key: str, value: str) -> bytes:
    """A record of an extension header, its own length before it."""
    rest = f" {key}={value}\n"
    length = len(rest) + 1
    while len(f"{length}{rest}") != length:
        length += 1
    return f"{length}{rest}".encode()


def _put_in(chance: Random, samples: Labelled, evil: bytes) -> bytes:
    """A tar with something between two of its samples."""
    tars = [tar_bytes(members([sample])) for sample in samples]
    bodies = [tar[: _end(tar)] for tar in tars]
    bodies.insert(chance.randrange(len(bodies) + 1), evil)
    return b"".join(bodies) + bytes(10240)


def _end(tar: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        opened.getmembers()
        return opened.offset


def _cut(chance: Random, samples: Labelled) -> bytes:
    whole = tar_bytes(members(samples))
    return whole[: chance.randrange(len(whole))]


def _cut_in_a_class(chance: Random, samples: Labelled) -> bytes:
    whole = tar_bytes(members(samples))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        chosen = chance.choice([each for each in tar if each.name.endswith(".cls")])
    return whole[: chosen.offset_data + chance.randrange(chosen.size + 1)]


def _flip_in_a_header(chance: Random, samples: Labelled) -> bytes:
    whole = bytearray(tar_bytes(members(samples)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        chosen = chance.choice(tar.getmembers())
    for _ in range(chance.choice((1, 2, 8))):
        whole[chosen.offset + chance.randrange(512)] ^= 1 << chance.randrange(8)
    return bytes(whole)


def _odd_size(chance: Random, samples: Labelled, size: int) -> bytes:
    if chance.random() < 0.5:
        number = size.to_bytes(11, "big", signed=True)
        evil = header(b"evil.jpg", (b"\xff" if size < 0 else b"\x80") + number)
    else:
        evil = extension(record("size", str(size))) + header(b"evil.jpg", b"%011o" % 512)
    return _put_in(chance, samples, evil)


def _negative_size(chance: Random, samples: Labelled) -> bytes:
    return _odd_size(chance, samples, -chance.choice((1, 512, 1024, 10240, 1 << 40)))


def _huge_size(chance: Random, samples: Labelled) -> bytes:
    return _odd_size(chance, samples, chance.choice((1 << 33, 1 << 62, 1 << 63, 1 << 80)))


def _chained_extensions(chance: Random, samples: Labelled) -> bytes:
    one = extension(record("comment", "x")) if chance.random() < 0.5 else _long_name(b"y.jpg")
    return _put_in(chance, samples, one * chance.choice((50, 3000)) + header(b"z", b"%011o" % 0))


def _long_name(name: bytes) -> bytes:
    return header(b"././@LongLink", b"%011o" % len(name), b"L") + name.ljust(512, b"\0")


def _odd_records(chance: Random, samples: Labelled) -> bytes:
    odd = [
        record("path", "../../etc/x.jpg"),
        record("size", "many"),
        record("GNU.sparse.map", "1,2,x"),
        record("GNU.sparse.realsize", "-100"),
        record("hdrcharset", "BINARY"),
        b"999999999999 path=x\n",
        b"0 =\n",
        b"\xff" * 40,
    ]
    evil = extension(chance.choice(odd)) + header(b"evil.jpg", b"%011o" % 0)
    return _put_in(chance, samples, evil)


def _sparse(chance: Random, samples: Labelled) -> bytes:
    head = header(b"evil.jpg", b"%011o" % 0, b"S")
    return _put_in(chance, samples, head + chance.randbytes(512) * chance.randrange(2))


def _links(chance: Random, samples: Labelled) -> bytes:
    kind = chance.choice((b"1", b"2"))
    key, image, _ = samples[0]
    tar = tar_bytes([("linked.jpg", image)])
    evil = tar[: _end(tar)]
    evil += header(b"linked.cls", b"%011o" % 0, kind, f"{key}.cls".encode())
    return _put_in(chance, samples, evil)


def _cat(chance: Random, samples: Labelled) -> bytes:
    half = len(samples) // 2
    return tar_bytes(members(samples[:half])) + tar_bytes(members(samples[half:]))


def _duplicates(chance: Random, samples: Labelled) -> bytes:
    """Two or three images under one key, some without a class, and all members in any order."""
    count = chance.choice((2, 3))
    alike = members([(samples[0][0], image, label) for _, image, label in samples[:count]])
    kept = [each for each in alike if each[0].endswith(".jpg") or chance.random() < 0.6]
    mixed = [*kept, *members(samples[count:])]
    chance.shuffle(mixed)
    return tar_bytes(mixed)


def _odd_classes(chance: Random, samples: Labelled) -> bytes:
    odd = chance.choice((b"cat", b"", b"-1", b"1.5", b"9" * 5000, b"0x3", b"1 2", b"\xff", b"1_0"))
    key, image, _ = samples[0]
    return tar_bytes([*members(samples[1:]), (f"{key}.jpg", image), (f"{key}.cls", odd)])


def _not_utf_8(chance: Random, samples: Labelled) -> bytes:
    _, image, label = samples[0]
    name = bytes(chance.randrange(128, 256) for _ in range(6))
    evil = b""
    for suffix, content in ((b".jpg", image), (b".cls", str(label).encode())):
        evil += header(name + suffix, b"%011o" % len(content)) + content
        evil += bytes(-len(content) % 512)
    return _put_in(chance, samples[1:], evil)


def _shadows(chance: Random, samples: Labelled) -> bytes:
    return tar_bytes(
        [(f"._{name}", b"Mac OS X") for name, _ in members(samples)] + members(samples)
    )


def _components(chance: Random, samples: Labelled) -> bytes:
    key, image, label = samples[0]
    extra = [(f"{key}.rgb.png", image), (f"{key}.depth.png", image), (f"{key}.cls", b"%d" % label)]
    return tar_bytes([*members(samples[1:]), *extra])


def _no_end(chance: Random, samples: Labelled) -> bytes:
    whole = tar_bytes(members(samples))
    return whole[: _end(whole) + chance.choice((0, 511))]


def _noise_at_the_end(chance: Random, samples: Labelled) -> bytes:
    return tar_bytes(members(samples)) + chance.randbytes(chance.randrange(1, 3000))


def _no_tar(chance: Random, samples: Labelled) -> bytes:
    return chance.randbytes(chance.randrange(5000))


TARS: dict[str, Maker] = {
    maker.__name__.lstrip("_"): maker
    for maker in (
        _cut,
        _cut_in_a_class,
        _flip_in_a_header,
        _negative_size,
        _huge_size,
        _chained_extensions,
        _odd_records,
        _sparse,
        _links,
        _cat,
        _duplicates,
        _odd_classes,
        _not_utf_8,
        _shadows,
        _components,
        _no_end,
        _noise_at_the_end,
        _no_tar,
    )
}
