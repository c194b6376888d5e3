import io
import tarfile
from contextlib import suppress

import pytest
import webdataset
from hostile_tars import extension, header, record
from samples import tar_bytes

from famt.pipeline.sharding.shards import (
    NO_LABEL,
    Rejected,
    content_id,
    list_shard,
    passed_over_line,
)

IMAGE = b"\xff\xd8 not decoded here"
PHOTO = ("a.jpg", IMAGE)


def _tar(*members, **options):
    """A tar of headers and their contents, with options of tarfile's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content, attributes in members:
            info = tarfile.TarInfo(name)
            for attribute, value in {**attributes, "size": len(content)}.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_offsets_point_at_the_bytes_that_webdataset_reads(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for n in range(5):
            writer.write({"__key__": f"k{n}", "jpg": IMAGE + bytes([n]), "cls": str(n).encode()})
    data = path.read_bytes()
    listing = list_shard(data)
    expected = [(s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(
        str(path), shardshuffle=False)]  # fmt: skip
    found = [(s.key, data[s.offset : s.offset + s.size], s.label) for s in listing.samples]
    assert found == expected
    assert listing.rejected == []
    assert listing.damage is None


def test_keys_with_dots_spaces_and_folders_and_any_image_suffix_are_welcome():
    names = ["n01/my photo.v2.jpg", "b.JPEG", "c.png", "d.WebP", "ü.jpeg", "e.tar.gz.jpg"]
    listing = list_shard(tar_bytes([(name, IMAGE) for name in names]))
    assert [s.key for s in listing.samples] == [name.rpartition(".")[0] for name in names]
    assert {s.label for s in listing.samples} == {NO_LABEL}


def test_labels_are_found_wherever_they_stand():
    members = [("a.cls", b"3"), ("a.jpg", IMAGE), ("b.v1.jpg", IMAGE), ("b.cls", b" 5\n"),
               ("c.v1.jpg", IMAGE), ("c.v1.cls", b"7"), ("d.jpg", IMAGE)]  # fmt: skip
    listing = list_shard(tar_bytes(members))
    assert {s.key: s.label for s in listing.samples} == {"a": 3, "b.v1": 5, "c.v1": 7, "d": -1}
    assert listing.rejected == []


def test_masks_are_found_wherever_they_stand():
    members = [("a.mask.png", b"1"), ("a.jpg", IMAGE), ("b.rgb.jpg", IMAGE), ("b.MASK.png", b"22"),
               ("c.v1.jpg", IMAGE), ("c.v1.mask.png", b"333"), ("d.jpg", IMAGE)]  # fmt: skip
    data = tar_bytes(members)
    listing = list_shard(data)
    masks = {s.key: s.mask and data[s.mask[0] : sum(s.mask)] for s in listing.samples}
    assert masks == {"a": b"1", "b.rgb": b"22", "c.v1": b"333", "d": None}
    assert listing.rejected == []


def test_other_components_are_counted_by_ending():
    members = [PHOTO, ("a.json", b"{}"), ("a.txt", b"hi"), ("README", b"x"), ("d/._a.jpg", b"x"),
               ("b.GIF", IMAGE), ("b.cls", b"1"), ("c.cls.txt", b"1"),
               ("c.mask.png", IMAGE)]  # fmt: skip
    listing = list_shard(tar_bytes(members))
    assert [s.key for s in listing.samples] == ["a"]
    assert listing.rejected == []
    counts = {".json": 1, ".txt": 2, "": 1, ".gif": 1, ".cls": 1, ".mask.png": 1}
    assert listing.passed_over == counts


def test_a_class_file_under_another_key_is_no_image():
    """`0.index.cls` is another component of sample 0, and its class is none that is read."""
    members = [(f"{n}.{kind}", b"1") for n in range(4) for kind in ("jpg", "index.cls")]
    listing = list_shard(tar_bytes(members))
    assert [(s.key, s.label) for s in listing.samples] == [(f"{n}", NO_LABEL) for n in range(4)]
    assert listing.rejected == []
    assert listing.passed_over == {".cls": 4}


@pytest.mark.parametrize("classes", [[b"3"], [b"9"], [b"3", b"9"], []])
def test_of_images_of_one_key_none_gets_a_class(classes):
    """Whose class it is can't be told where both come first, or the first has none."""
    first = [("a.jpg", IMAGE), ("b.jpg", IMAGE), ("b.cls", b"1")]
    members = [*first, ("a.jpg", IMAGE + b"2"), *(("a.cls", each) for each in classes)]
    listing = list_shard(tar_bytes(members))
    assert [(s.key, s.label) for s in listing.samples] == [("b", 1)]
    assert listing.rejected == [Rejected("a.jpg", "duplicate key: 2 images have it")] * 2


def test_the_line_of_what_was_passed_over_names_the_most_frequent_endings():
    many = {f".{n}": n for n in range(1, 11)}
    line = passed_over_line([{".gif": 40}, {".gif": 2, "": 30}, many])
    assert line.startswith("passed over in the shards: 42 .gif, 30 without an ending, 10 .10, 9 .9")
    assert "5 .5, 10 others; images are files of .jpeg, .jpg, .png, .webp" in line
    assert passed_over_line([{}, {}]) == ""


@pytest.mark.parametrize(
    ("members", "name", "reason"),
    [
        ([("a.jpg", b"")], "a.jpg", "empty"),
        ([PHOTO, ("a.png", IMAGE)], "a.png", "duplicate key: 2 images have it"),
        ([("../a.jpg", IMAGE)], "../a.jpg", "name points outside the shard"),
        ([PHOTO, ("a.cls", b"cat")], "a.jpg", "its class b'cat' is no integer"),
        ([PHOTO, ("a.cls", b"-4")], "a.jpg", "its class -4 is out of range"),
        ([PHOTO, ("a.depth.png", IMAGE), ("a.cls", b"1")], "a.depth.png",
         "another component of a sample that has an image already"),
        ([PHOTO, ("a.mask.png", b"")], "a.jpg", "its mask can't be used: empty"),
        ([PHOTO, *[("a.mask.png", IMAGE)] * 2], "a.jpg", "it has 2 masks"),
        ([PHOTO, ("a.cls", b"1_0")], "a.jpg", "its class b'1_0' is no integer"),
        ([PHOTO, ("a.cls", b"1"), ("a.cls", b"2")], "a.jpg", "it has several classes: 1, 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_rejected_with_a_reason(members, name, reason):
    listing = list_shard(tar_bytes([("good.jpg", IMAGE), *members]))
    assert Rejected(name, reason) in listing.rejected
    assert "good" in {s.key for s in listing.samples}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_never_followed_and_reject_their_sample(kind):
    link = {"type": kind, "linkname": "a.cls"}
    plain = [("a.jpg", IMAGE, {}), ("a.cls", b"7", {}), ("b.jpg", IMAGE, {})]
    listing = list_shard(_tar(*plain, ("b.cls", b"", link), ("c.jpg", b"", link)))
    assert [(s.key, s.label) for s in listing.samples] == [("a", 7)]
    assert listing.rejected == [
        Rejected("b.jpg", "its class is not a regular file"),
        Rejected("c.jpg", "not a regular file"),
    ]


def test_a_class_is_never_read_by_halves():
    whole = tar_bytes([("a.jpg", IMAGE), ("a.cls", b"123"), ("b.jpg", IMAGE), ("b.cls", b"456")])
    for length in range(len(whole)):
        for sample in list_shard(whole[:length]).samples:
            assert sample.label == {"a": 123, "b": 456}[sample.key]


def test_a_tar_broken_at_the_header_of_a_class_loses_the_sample_not_the_class():
    whole = bytearray(tar_bytes([("a.jpg", IMAGE), ("a.json", b"{}"), ("a.cls", b"7")]))
    whole[2048] ^= 1  # the third header
    listing = list_shard(bytes(whole))
    assert listing.samples == []
    assert "the tar is broken after it" in listing.rejected[0].reason
    assert "no end-of-archive mark" in listing.damage


def test_of_images_that_webdataset_takes_for_one_sample_none_is_guessed_to_be_the_photo():
    members = [("1.rgb.png", IMAGE), ("1.depth.png", IMAGE), ("1.cls", b"1"), ("2.rgb.png", IMAGE)]
    listing = list_shard(tar_bytes(members))
    assert [s.key for s in listing.samples] == ["2.rgb"]
    assert [bad.key for bad in listing.rejected] == ["1.depth.png", "1.rgb.png"]
    assert "name its photo 1.png" in listing.rejected[0].reason


def test_images_that_have_classes_of_their_own_are_samples_of_their_own():
    members = [(f"IMG.{n}.{kind}", b"1") for n in range(3) for kind in ("jpg", "cls")]
    assert [s.key for s in list_shard(tar_bytes(members)).samples] == ["IMG.0", "IMG.1", "IMG.2"]


def test_shadows_of_macos_are_ignored_whatever_they_shadow():
    members = [("a.jpg", IMAGE), ("a.cls", b"1"), ("._a.jpg", b"x"), ("._a.cls", b"Mac OS X")]
    listing = list_shard(tar_bytes(members))
    assert [(s.key, s.label) for s in listing.samples] == [("a", 1)]
    assert listing.rejected == []


def test_a_tar_appended_by_cat_is_reported():
    first, second = (tar_bytes([(f"{name}.jpg", IMAGE)]) for name in "ab")
    listing = list_shard(first + second)
    assert [s.key for s in listing.samples] == ["a"]
    assert "join tars by `tar --concatenate`" in listing.damage
    assert list_shard(first + bytes(70_000)).damage is None


@pytest.mark.parametrize(
    "evil",
    [
        header(b"b.jpg", b"\xff" * 12),
        header(b"b.jpg", b"\xff" * 10 + b"\xf6\x00"),
        extension(record("size", "-1024")) + header(b"b.jpg", b"%011o" % 5),
        extension(record("size", "-10240")) + header(b"b.jpg", b"%011o" % 5),
        extension(record("GNU.sparse.realsize", "-1000000")) + header(b"b.jpg", b"%011o" % 5),
        extension(record("mtime", "1.")) * 3000 + header(b"b.jpg", b"%011o" % 5),
        header(b"b.jpg", b"\x80" + b"\xff" * 11),
    ],
)
def test_a_hostile_header_ends_the_tar_there_and_nothing_hangs(evil):
    good = tar_bytes([("a.jpg", IMAGE), ("a.cls", b"1")])[:2048]
    listing = list_shard(good + evil + good + bytes(1024))
    assert [(s.key, s.label) for s in listing.samples][:1] == [("a", 1)]
    assert listing.damage or listing.rejected


def test_names_that_are_no_text_are_escaped():
    members = [(name, IMAGE, {}) for name in ("ä.jpg", "ü\n.jpg")]
    data = _tar(*members, format=tarfile.USTAR_FORMAT, encoding="latin-1")
    keys = [s.key for s in list_shard(data).samples]
    assert keys == [r"\udce4", r"\udcfc\n"]
    for key in keys:
        key.encode("ascii")


def test_a_cut_tar_keeps_what_came_before_the_cut_and_is_reported():
    whole = tar_bytes([(f"{n}.jpg", IMAGE * 100) for n in range(4)])
    all_samples = list_shard(whole).samples
    for length in range(0, len(whole), 97):
        listing = list_shard(whole[:length])
        kept = [s for s in all_samples if s.offset + s.size <= length]
        if kept and sum(s.offset <= length for s in all_samples) == len(kept) and listing.damage:
            kept.pop()  # what can't be read after it may have been its class
        assert listing.samples == kept
        if length < len(whole) - 10240:
            assert listing.damage
    assert list_shard(whole).damage is None


def _as_tarfile_reads(data):
    members = []
    with (
        suppress(tarfile.TarError, ValueError),
        tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar,
    ):
        for member in tar:
            members.append((member.name, member.offset_data, member.size))
    return members


def test_a_broken_header_is_read_as_tarfile_reads_it():
    whole = tar_bytes([("a.jpg", IMAGE * 100), ("b.jpg", IMAGE), ("c.jpg", IMAGE)])
    second = list_shard(whole).samples[1].offset - tarfile.BLOCKSIZE
    found = set()
    for position in range(second, second + tarfile.BLOCKSIZE):
        for bit in (1, 64):
            broken = bytearray(whole)
            broken[position] ^= bit
            expected = _as_tarfile_reads(bytes(broken))
            listing = list_shard(bytes(broken))
            seen = [(f"{s.key}.jpg", s.offset, s.size) for s in listing.samples]
            if listing.damage:  # what can't be read after it may have been its class
                assert listing.rejected[0].key == expected.pop()[0]
            assert seen == expected
            found.add(len(expected))
    assert found == {0, 3}  # the checksum tells on all but a flip in the space that ends it


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_name_and_header_is_read_as_tarfile_reads_it(form):
    names = ("a.jpg", f"{'d' * 90}/{'e' * 60}.jpg", "ü.jpg", f"{'f' * 95}.jpg")
    odd = {"mtime": 1.5, "uid": 2_000_000}
    data = _tar(*((name, IMAGE, odd) for name in names), format=form)
    found = [(f"{s.key}.jpg", s.offset, s.size) for s in list_shard(data).samples]
    assert found == _as_tarfile_reads(data)
    assert len(found) == 4


def test_a_size_of_twelve_digits_is_read_as_tarfile_reads_it():
    """Some writers end the field with a digit."""
    data = bytearray(tar_bytes([("a.jpg", IMAGE), ("b.jpg", IMAGE)]))
    data[124:136] = b"%012o" % len(IMAGE)
    checksum = sum(data[:148]) + 8 * ord(" ") + sum(data[156:512])
    data[148:156] = b"%06o\0 " % checksum
    assert [s.size for s in list_shard(bytes(data)).samples] == [len(IMAGE)] * 2


def test_garbage_is_reported_not_raised():
    listing = list_shard(b"not a tar" * 1000)
    assert listing.samples == []
    assert "tar" in listing.damage


def test_a_content_id_follows_the_bytes_alone():
    assert content_id(b"a") == content_id(b"a")
    assert content_id(b"a") != content_id(b"b")
    # The first 16 bytes of the hash that BLAKE3's own test vectors give for no input.
    assert content_id(b"") == "af1349b9f5f9a1a6a0404dea36dcc949"
