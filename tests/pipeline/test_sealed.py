import json
import random

import pytest

from famt.pipeline.errors import CacheError
from famt.pipeline.sealed import seal, seal_zarr, unseal, unseal_zarr

CONTENT = {"folder": "/data/ü", "n": 7, "x": [0.25, None, True], "y": {"b": 1, "a": "\udcff"}}


def test_what_was_sealed_comes_back():
    assert unseal(seal(CONTENT, "y"), "x", "y", "") == CONTENT


def test_spaces_and_the_order_of_keys_are_not_content():
    shuffled = dict(reversed(json.loads(seal(CONTENT, "y")).items()))
    assert unseal(json.dumps(shuffled, indent=7).encode(), "x", "y", "") == CONTENT


@pytest.mark.parametrize("zarr", [False, True])
def test_every_flipped_bit_is_noticed_or_changes_nothing(zarr):
    if zarr:
        data = seal_zarr(json.dumps({"zarr_format": 3, "attributes": CONTENT}).encode(), "y")
    else:
        data = seal(CONTENT, "y")
    read = unseal_zarr if zarr else unseal
    whole, noticed = read(data, "x", "y", ""), 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(flipped), "x", "y", "") == whole
        except CacheError:
            noticed += 1
    assert noticed > 4 * len(data)  # the others are in spaces


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"1", b"{", b"\xff\xfe", b"[" * 10**5]
)
@pytest.mark.parametrize("read", [unseal, unseal_zarr])
def test_what_is_no_sealed_object_is_named_with_the_remedy(read, data):
    with pytest.raises(CacheError, match=r"x/y is damaged \(.*\)\. Remove it"):
        read(data, "x", "y", "Remove it")


def test_random_bytes_never_raise_anything_else():
    rng = random.Random(0)
    for _ in range(300):
        with pytest.raises(CacheError):
            unseal(rng.randbytes(rng.randrange(40)), "x", "y", "")


@pytest.mark.parametrize("old", [{"format": 2, "shards": {}}, {"format": 2}])
def test_what_an_older_program_wrote_is_called_that_not_damaged(old):
    with pytest.raises(CacheError, match=r"has format 2.*another cache"):
        unseal(json.dumps(old).encode(), "x", "y", "")
    with pytest.raises(CacheError, match=r"has format 2"):
        unseal_zarr(json.dumps({"attributes": old}).encode(), "x", "y", "")


@pytest.mark.parametrize("zarr", [False, True])
def test_what_belongs_to_another_place_is_refused(zarr):
    if zarr:
        data = seal_zarr(json.dumps({"zarr_format": 3, "attributes": CONTENT}).encode(), "y/a")
    else:
        data = seal(CONTENT, "y/a")
    with pytest.raises(CacheError, match=r"x/y/b is damaged \(.* is another object\)\. Remove it"):
        (unseal_zarr if zarr else unseal)(data, "x", "y/b", "Remove it")
