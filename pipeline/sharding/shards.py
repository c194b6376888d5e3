"""List a webdataset tar: which members are images, where their bytes lie, and their labels.

Nothing is extracted. A sample is an offset and a size in the tar; the DALI index holds the same two
numbers, so a sample that is not listed here never reaches training.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from blake3 import blake3

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_EXTENSION = "cls"
MASK_EXTENSION = "mask.png"
NO_LABEL = -1
_JUDGEMENTS = 100  # of one tar, at most
_ENDINGS = 8  # named in a message


@dataclass(frozen=True)
class Sample:
    """One image of a shard.

    Attributes:
        offset, size: of its bytes in the tar.
        label: its class, or `NO_LABEL`.
        mask: offset and size of its segmentation mask, or None.
    """

    key: str
    offset: int
    size: int
    label: int
    mask: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rejected:
    """An image that can't enter training, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardListing:
    """The contents of a tar.

    Attributes:
        samples, rejected: together all images of the tar; samples in tar order.
        damage: what is wrong with the tar, or None; samples before the damage are listed.
        passed_over: number of files that belong to no image, by ending such as `.json`.
    """

    samples: list[Sample]
    rejected: list[Rejected]
    damage: str | None
    passed_over: dict[str, int]


def content_id(data: bytes) -> str:
    """The id of a shard in the cache: 32 hex digits of its bytes' BLAKE3."""
    return blake3(data).hexdigest(length=16)


def judgement_ids(content: str) -> list[str]:
    """The ids that a tar's entries may have in the cache, one for each time it was judged.

    An entry never changes, since all its maps follow the rows of its table. A tar that is judged
    again with another verdict gets another entry. The first id is `content` itself.
    """
    later = (f"{content} judged again {n}".encode() for n in range(1, _JUDGEMENTS))
    return [content, *(content_id(text) for text in later)]


def list_shard(data: bytes) -> ShardListing:
    """List the images of a tar in memory.

    A sample is a member named `<key>.<jpg|jpeg|png|webp>` in any case. Its class is the integer in
    `<key>.cls`, or in `<group>.cls`, where the group is the key up to its first dot, as webdataset
    groups files. Its mask is `<key>.mask.png` or `<group>.mask.png`. Keys may hold dots, spaces and
    folders. Of several images of one group, such as `7.jpg` and `7.depth.png`, only the one named
    by the group is a sample. Bytes of a name that are no text become escapes. Other members are
    counted by ending, except macOS's shadow files (`._<name>`).

    If an image's class or mask, or the image of a group, is ambiguous, it is rejected. So are all
    images of one key.
    """
    members, damage, broken = _read_members(data)
    files = [
        member
        for member in members
        if not member.isdir() and not PurePosixPath(member.name).name.startswith("._")
    ]
    images, labels, masks = (defaultdict[str, list[tarfile.TarInfo]](list) for _ in range(3))
    passed_over: Counter[str] = Counter()
    for member in files:
        if member.name.lower().endswith(f".{MASK_EXTENSION}"):
            masks[member.name[: -len(MASK_EXTENSION) - 1]].append(member)
        elif _extension(member.name) == LABEL_EXTENSION:
            labels[_stem(member.name)].append(member)
        elif _extension(member.name) in IMAGE_EXTENSIONS:
            images[_stem(member.name)].append(member)
        else:
            passed_over[PurePosixPath(member.name).suffix.lower()] += 1
    alike = Counter(map(_webdataset_key, images))
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for key, (member, *others) in images.items():
        group = _webdataset_key(key)
        try:
            if others:
                raise ValueError(f"duplicate key: {1 + len(others)} images have it")
            _check(member, len(data))
            if key != group and group in images:
                raise ValueError("another component of a sample that has an image already")
            if key != group and key not in labels and alike[group] > 1:
                raise ValueError(
                    f"one of {alike[group]} images of sample {group}: name its photo {group}."
                    f"{_extension(member.name)}, or give each image a class or name of its own"
                )
            label = _read_label(data, labels.get(key, labels.get(group, [])))
            may_go_on = bool(labels) or group == _webdataset_key(files[-1].name)
            if label == NO_LABEL and broken and may_go_on:
                raise ValueError("has no class, and may have had one: the tar is broken after it")
            mask = _find_mask(data, masks.get(key, masks.get(group, [])))
        except ValueError as error:
            rejected += [Rejected(each.name, str(error)) for each in (member, *others)]
        else:
            samples.append(Sample(key, member.offset_data, member.size, label, mask))
    for ending, owned in ((LABEL_EXTENSION, labels), (MASK_EXTENSION, masks)):
        owners = {key if key in owned else _webdataset_key(key) for key in images}
        if left := sum(len(owned[key]) for key in owned.keys() - owners):
            passed_over[f".{ending}"] = left
    rejected.sort(key=lambda bad: bad.key)
    return ShardListing(samples, rejected, damage, dict(passed_over))


def passed_over_line(counts: Iterable[Mapping[str, int]]) -> str:
    """A message on files in shards that belong to no image; "" if there are none."""
    total = sum(map(Counter, counts), Counter[str]())
    if not total:
        return ""
    return (
        f"passed over in the shards: {count_endings(total)}; images are files of "
        f".{', .'.join(sorted(IMAGE_EXTENSIONS))}, their classes of .{LABEL_EXTENSION} alone"
    )


def count_endings(counts: Mapping[str, int]) -> str:
    """Numbers of files by ending, in words: the most frequent endings, then the rest."""
    most = Counter(counts).most_common()
    named = [f"{count} {ending or 'without an ending'}" for ending, count in most[:_ENDINGS]]
    rest = sum(count for _, count in most[_ENDINGS:])
    return ", ".join([*named, f"{rest} others"] if rest else named)


class _Header(tarfile.TarInfo):
    """tarfile's header, parsed in a third of the time if it is a plain file's."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        size, checksum = buf[124:135], buf[148:154]
        if not (
            len(buf) == tarfile.BLOCKSIZE
            and buf[156:157] == tarfile.REGTYPE
            and buf[345:346] == b"\0"  # no prefix: the first field has the whole name
            and buf[135:136] in b"\0 "
            and buf[154:156] == b"\0 "
            and size.translate(None, b"01234567") == checksum.translate(None, b"01234567") == b""
            and int(checksum, 8) == sum(buf[:148]) + 8 * ord(" ") + sum(buf[156:])
        ):
            return super().frombuf(buf, encoding, errors)
        header = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        header.size = int(size, 8)
        return header


# What tarfile raises on hostile headers.
_UNREADABLE = (
    tarfile.TarError,
    ArithmeticError,
    EOFError,
    LookupError,
    RecursionError,  # thousands of extension headers in a row
    ValueError,
)


def _read_members(data: bytes) -> tuple[list[tarfile.TarInfo], str | None, bool]:
    """The readable members of a tar, with escaped names; what is wrong with it, or None; and
    whether reading stopped before its end."""
    members: list[tarfile.TarInfo] = []
    offset = -1
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                if member.size < 0 or tar.offset <= offset:
                    raise ValueError(f"a member of {member.size} bytes")
                offset = tar.offset
                member.name = _escape(member.name)
                members.append(member)
            end = tar.offset
    except _UNREADABLE as error:
        return members, f"not readable as a tar beyond {len(members)} members: {error}", True
    if members and members[-1].offset_data + members[-1].size > len(data):
        return members, f"cut off inside {members[-1].name} at {len(data)} bytes", True
    # tarfile stops silently at a broken header, as at the end-of-archive mark, a block of zeros.
    if data[end : end + tarfile.BLOCKSIZE].strip(b"\0") or end >= len(data):
        damage = f"cut off or broken at byte {min(end, len(data))}: no end-of-archive mark"
        return members, damage, True
    if beyond := data[end:].strip(b"\0"):
        damage = (
            f"{len(beyond)} bytes after its end-of-archive mark at byte {end} are not read; "
            "join tars by `tar --concatenate`, not by `cat`"
        )
        return members, damage, False
    return members, None, False


def _escape(name: str) -> str:
    """A name whose control characters and undecodable bytes are backslash escapes."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]",
        lambda each: each[0].encode("unicode_escape").decode(),
        name,
    )


def _check(member: tarfile.TarInfo, length: int, what: str = "") -> None:
    """Refuse what can't be read from a tar of that length; `what` it is begins the reason."""
    if not member.isreg() or member.issparse():
        raise ValueError(f"{what}not a regular file")
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        raise ValueError(f"{what}name points outside the shard")
    if member.size == 0:
        raise ValueError(f"{what}empty")
    if member.offset_data + member.size > length:
        raise ValueError(f"{what}cut off by the end of the tar")


def _find_mask(data: bytes, members: list[tarfile.TarInfo]) -> tuple[int, int] | None:
    if not members:
        return None
    if len(members) > 1:
        raise ValueError(f"it has {len(members)} masks")
    _check(members[0], len(data), "its mask can't be used: ")
    return members[0].offset_data, members[0].size


def _read_label(data: bytes, members: list[tarfile.TarInfo]) -> int:
    labels = set()
    for member in members:
        _check(member, len(data), "its class is ")
        text = data[member.offset_data : member.offset_data + member.size]
        if not re.fullmatch(rb"\s*[+-]?[0-9]{1,20}\s*", text):
            raise ValueError(f"its class {text[:20]!r} is no integer")
        labels.add(int(text))
    if len(labels) > 1:
        raise ValueError(f"it has several classes: {', '.join(map(str, sorted(labels)))}")
    label = labels.pop() if labels else NO_LABEL
    if members and not 0 <= label < 2**31:
        raise ValueError(f"its class {label} is out of range")
    return label


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _webdataset_key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
