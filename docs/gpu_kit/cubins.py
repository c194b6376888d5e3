"""Zero GPU code of unwanted architectures in a shared library, so that it compresses to nothing.

nvcc stores GPU code in the ELF section `.nv_fatbin`: containers, each a header of 16 bytes (magic
u32, version u16, header size u16, body size u64) and a body of entries, each with its own header
(at 4: header size u32, at 8: payload size u64, at 28: architecture u32) and payload. Sizes and
offsets do not change; only payloads become zeros. A driver that finds an entry for its own
architecture reads no other.
"""

import struct
from collections.abc import Iterator, Set

_MAGIC = struct.pack("<I", 0xBA55ED50)


def keep_architectures(library: bytearray, keep: Set[int]) -> int:
    """Zero in place the payloads of all architectures but `keep` (90 is Hopper's sm_90).

    A container with no entry to keep stays whole: the driver uses its code for an older
    architecture, or compiles its PTX. Returns the number of bytes zeroed; 0 for a file that is no
    64-bit ELF or has no GPU code. Raises ValueError if entries do not fill their container.
    """
    zeroed = 0
    at, end = _section(library, b".nv_fatbin")
    while (at := library.find(_MAGIC, at, end)) >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        body, at = at + header, at + header + size
        entries = list(_entries(library, body, at))
        if keep.isdisjoint(architecture for architecture, _, _ in entries):
            continue
        for architecture, start, length in entries:
            if architecture not in keep:
                library[start : start + length] = bytes(length)
                zeroed += length
    return zeroed


def _entries(library: bytearray, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield architecture, start of the payload and its length."""
    while at + 32 <= end:
        header, payload = struct.unpack_from("<IQ", library, at + 4)
        if header < 32:
            break
        (architecture,) = struct.unpack_from("<I", library, at + 28)
        yield architecture, at + header, payload
        at += header + payload
    if at != end:
        raise ValueError(f"GPU code of an unknown layout before byte {end}; pack without --arch")


def _section(library: bytearray, name: bytes) -> tuple[int, int]:
    """Return start and end of an ELF section; an empty range if there is none."""
    if library[:5] != b"\x7fELF\x02":
        return 0, 0
    (table,) = struct.unpack_from("<Q", library, 40)
    width, count, names = struct.unpack_from("<3H", library, 58)
    heads = [
        struct.unpack_from("<I20xQQ", library, table + width * index) for index in range(count)
    ]
    for label, start, size in heads:
        at = heads[names][1] + label
        if library[at : library.index(0, at)] == name:
            return start, start + size
    return 0, 0
