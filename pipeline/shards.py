"""What is inside a webdataset tar: which members are images, where their bytes lie, their labels.

Nothing is ever extracted: a sample is an offset and a size in the tar, so a member's name can point
nowhere. The same two numbers make the DALI index, which is why a sample left out here never reaches
training.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blake3 import blake3

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_EXTENSION = "cls"
MASK_EXTENSION = "mask.png"
NO_LABEL = -1


@dataclass(frozen=True)
class Sample:
    """One image of a shard.

    Attributes:
        offset, size: where its bytes lie in the tar.
        label: its class, `NO_LABEL` if none.
        mask: offset and size of the mask that tells the class of every pixel, or None.
    """

    key: str
    offset: int
    size: int
    label: int
    mask: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rejected:
    """One member that can't enter training, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardListing:
    """All that a tar holds: `samples` in tar order, `rejected` with reasons, and its damage.

    Attributes:
        damage: what is wrong with the tar itself, or None; the samples before the damage stand.
    """

    samples: list[Sample]
    rejected: list[Rejected]
    damage: str | None


def content_id(data: bytes) -> str:
    """The name of a shard in the cache: BLAKE3 of its bytes, 32 hex digits of it."""
    return blake3(data).hexdigest(length=16)


def list_shard(data: bytes) -> ShardListing:
    """Find the images of a tar in memory.

    A sample is a member named `<key>.<jpg|jpeg|png|webp>`, whatever the case; its class is the
    integer text of `<key>.cls`, or of the `.cls` under the name up to its first dot, as webdataset
    groups files. A `<key>.mask.png`, found alike, is the sample's mask. Keys may hold dots, spaces
    and folders; but beside `<key>.jpg`, an image such as `<key>.depth.png` is another component of
    that sample and rejected. Other members are ignored.
    """
    members, damage = _members(data)
    labels = {
        member.name.rpartition(".")[0]: member
        for member in members
        if _extension(member.name) == LABEL_EXTENSION and member.isreg()
    }
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    labelled: set[str] = set()
    images = [
        member
        for member in members
        if _extension(member.name) in IMAGE_EXTENSIONS
        and not member.isdir()
        and not PurePosixPath(member.name).name.startswith("._")  # macOS's shadow of a file
    ]
    masks = {
        member.name[: -len(MASK_EXTENSION) - 1]: member
        for member in images
        if member.name.lower().endswith(f".{MASK_EXTENSION}")
    }
    images = [m for m in images if not m.name.lower().endswith(f".{MASK_EXTENSION}")]
    stems = {member.name.rpartition(".")[0] for member in images}
    for key, member in list(masks.items()):
        try:
            _check_member(member, key, set(), len(data))
            if key not in stems | {_webdataset_key(stem + ".") for stem in stems}:
                raise ValueError("a mask without an image")
        except ValueError as error:
            rejected.append(Rejected(member.name, str(error)))
            del masks[key]
    for member in images:
        key = member.name.rpartition(".")[0]
        label_key = key if key in labels else _webdataset_key(member.name)
        labelled.add(label_key)
        try:
            _check_member(member, key, seen, len(data))
            if key != _webdataset_key(member.name) and _webdataset_key(member.name) in stems:
                raise ValueError("another component of a sample that has an image already")
            label = _read_label(data, labels.get(label_key))
        except ValueError as error:
            rejected.append(Rejected(member.name, str(error)))
            continue
        seen.add(key)
        mask = masks.get(key if key in masks else _webdataset_key(member.name))
        place = (mask.offset_data, mask.size) if mask else None
        samples.append(Sample(key, member.offset_data, member.size, label, place))
    rejected += [
        Rejected(labels[key].name, "a class without an image") for key in labels.keys() - labelled
    ]
    return ShardListing(samples, sorted(rejected, key=lambda bad: bad.key), damage)


def write_dali_index(path: Path, samples: Iterable[tuple[int, int, int]]) -> None:
    """Write the index of one tar for DALI's webdataset reader.

    DALI echoes a sample's name with its data, so the name carries the sample's row.

    Args:
        path: file to write.
        samples: (row, offset, size) of each image to be read, in tar order.
    """
    lines = [f"jpg {offset} {size} {row}" for row, offset, size in samples]
    path.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))


class _Header(tarfile.TarInfo):
    """tarfile's header, read in a third of the time where it is that of a plain file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        size, checksum = buf[124:135], buf[148:154]
        if not (
            len(buf) == tarfile.BLOCKSIZE
            and buf[156:157] == tarfile.REGTYPE
            and buf[345:346] == b"\0"  # the whole name stands in its first field
            and buf[135:136] in b"\0 "
            and buf[154:156] == b"\0 "
            and size.translate(None, b"01234567") == checksum.translate(None, b"01234567") == b""
            and int(checksum, 8) == sum(buf[:148]) + 8 * ord(" ") + sum(buf[156:])
        ):
            return super().frombuf(buf, encoding, errors)
        header = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        header.size = int(size, 8)
        return header


def _members(data: bytes) -> tuple[list[tarfile.TarInfo], str | None]:
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                members.append(member)
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        return members, f"not readable as a tar beyond {len(members)} members: {error}"
    if members and members[-1].offset_data + members[-1].size > len(data):
        return members, f"cut off inside {members[-1].name} at {len(data)} bytes"
    # tarfile stops at a broken header as quietly as at the end-of-archive mark, a block of zeros.
    if data[end : end + tarfile.BLOCKSIZE].strip(b"\0") or end >= len(data):
        return members, f"cut off or broken at byte {min(end, len(data))}: no end-of-archive mark"
    return members, None


def _check_member(member: tarfile.TarInfo, key: str, seen: set[str], length: int) -> None:
    if not member.isreg() or member.issparse():
        raise ValueError("not a regular file")
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        raise ValueError("name points outside the shard")
    if member.size == 0:
        raise ValueError("empty")
    if member.offset_data + member.size > length:
        raise ValueError("cut off by the end of the tar")
    if key in seen:
        raise ValueError("duplicate key")


def _read_label(data: bytes, member: tarfile.TarInfo | None) -> int:
    if member is None:
        return NO_LABEL
    text = data[member.offset_data : member.offset_data + member.size]
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"its class {text[:20]!r} is no integer") from None
    if not 0 <= label < 2**31:
        raise ValueError(f"its class {label} is out of range")
    return label


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _webdataset_key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
