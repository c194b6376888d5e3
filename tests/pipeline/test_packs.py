"""Packs: the same rows and maps as from entries, in whatever state they are."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_layouts import PIXELS, table

from famt.pipeline import packs
from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.packs import Packed, check_pack, pack_loose, read_pack, useful_packs, write_pack
from famt.pipeline.scores import ScoreSpec

SHARDS = 70
OTHER = ScoreSpec(kind="highpass", grid=3)


def _id(number):
    return f"{number:032x}"


def _write(cache, number, spec=PIXELS):
    """An entry of 0 to 3 samples."""
    count = number % 4
    maps = np.random.default_rng(number).random((count, spec.grid, spec.grid)) + 0.5
    cache.write(_id(number), table(count), spec, maps.astype(np.float16))


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entries") / "cache"
    cache = ScoreCache(str(folder), create=True)
    for number in range(SHARDS):
        _write(cache, number)
    return folder


@pytest.fixture
def cache(entries, tmp_path):
    return ScoreCache(str(shutil.copytree(entries, tmp_path / "cache")))


def _gathered(cache, ids, spec=PIXELS):
    packed = Packed(cache, spec, len(ids))
    samples, counts = packed.samples(ids)
    return samples, counts, packed.maps(ids, counts)


def _expected(cache, ids, spec=PIXELS):
    samples = cache.read_samples(ids)
    return (
        np.concatenate(samples),
        list(map(len, samples)),
        np.concatenate(cache.read_maps(ids, spec)),
    )


def _assert_same(cache, ids, spec=PIXELS):
    for found, expected in zip(
        _gathered(cache, ids, spec), _expected(cache, ids, spec), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def _without_entries(cache):
    """Only what lies in packs can be read afterwards."""
    shutil.rmtree(Path(cache.url) / "shards")


IDS = [_id(number) for number in range(SHARDS)]


def test_what_is_packed_is_read_from_the_pack_alone(cache, monkeypatch):
    monkeypatch.setattr("famt.pipeline.arrays._CHUNK", 100)  # chunks of 4 rows, and of 12 maps
    expected = _expected(cache, IDS)
    assert pack_loose(cache, IDS, PIXELS).shards == IDS
    _without_entries(cache)
    for found, wanted in zip(_gathered(cache, IDS), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("chunk", [1, 24, 100, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_any_choice_in_any_order_is_what_the_entries_hold(cache, monkeypatch, chunk, seed):
    monkeypatch.setattr("famt.pipeline.arrays._CHUNK", chunk)
    monkeypatch.setattr(packs, "_FEW", 1)
    rng = random.Random(seed)
    for _ in range(2):  # packs that overlap, and leave some out
        write_pack(cache, rng.sample(IDS, 40), PIXELS)
    _assert_same(cache, rng.choices(IDS, k=90))  # two tars may hold the same bytes
    _assert_same(cache, IDS[:5])
    _assert_same(cache, IDS)


def test_maps_of_another_score_are_never_taken_from_a_pack(cache):
    pack_loose(cache, IDS, PIXELS)
    for number in range(SHARDS):
        _write(cache, number, OTHER)
    _assert_same(cache, IDS, OTHER)
    assert pack_loose(cache, IDS, OTHER).spec_id == OTHER.id
    _assert_same(cache, IDS, OTHER)
    _assert_same(cache, IDS)


def test_only_what_is_in_no_pack_is_packed_and_only_if_it_is_much(cache):
    assert pack_loose(cache, IDS[:63], PIXELS) is None  # as fast one by one
    first = pack_loose(cache, IDS, PIXELS)
    assert pack_loose(cache, IDS, PIXELS) is None
    more = [_id(number) for number in range(SHARDS, SHARDS + 65)]
    for number in range(SHARDS, SHARDS + 65):
        _write(cache, number)
    assert pack_loose(cache, IDS + more[:60], PIXELS) is None
    second = pack_loose(cache, IDS + more, PIXELS)
    assert (first.shards, second.shards) == (IDS, more)
    _without_entries(cache)
    assert _gathered(cache, more + IDS)[1] == [n % 4 for n in (*range(70, 135), *range(70))]


def test_equal_shards_and_scores_make_the_same_pack(cache):
    first = write_pack(cache, IDS, PIXELS)
    objects = {each.path: cache.objects.get(each.path) for each in cache.objects.below("packs")}
    assert write_pack(cache, IDS, PIXELS) == first
    assert {p.path: cache.objects.get(p.path) for p in cache.objects.below("packs")} == objects
    assert len({each.split("/")[1] for each in objects}) == 1
    assert write_pack(cache, IDS[::-1], PIXELS).folder != first.folder


def test_a_pack_is_read_only_when_its_last_object_is_there(cache):
    """A writer that is killed after each object in turn."""
    root = Path(cache.url) / write_pack(cache, IDS, PIXELS).folder
    written = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    order = sorted(written, key=lambda path: path.stat().st_mtime_ns)
    assert order[-1] == root / "zarr.json"
    for cut in range(len(order)):
        for path in order[cut:]:
            path.unlink(missing_ok=True)
        assert read_pack(cache, root.name) is None
        assert IDS[0] not in Packed(cache, PIXELS, SHARDS)
        _assert_same(cache, IDS)
        write_pack(cache, IDS, PIXELS)
        assert {path: path.read_bytes() for path in written} == written


def test_no_damage_in_a_pack_changes_what_is_read_and_a_check_names_it(cache, capsys, monkeypatch):
    """Each object in turn: gone, cut short, longer, and many a bit of it flipped."""
    monkeypatch.setattr(packs, "_FEW", 1)
    ids = IDS[:8]
    pack = write_pack(cache, ids, PIXELS)
    root = Path(cache.url) / pack.folder
    expected = _expected(cache, ids)
    told = 0
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        versions = [None, b"", data[:-1], data[: len(data) // 2], data + b"x", bytes(len(data))]
        for bit in range(0, 8 * len(data), max(1, 8 * len(data) // 12)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            versions.append(bytes(flipped))
        for version in versions:
            path.unlink() if version is None else path.write_bytes(version)
            for found, wanted in zip(_gathered(cache, ids), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
            said = capsys.readouterr().err
            told += f"Remove {root}; " in said
            if path.name != "zarr.json" or path.parent != root:
                try:
                    check_pack(cache, pack, set(ids))
                except CacheError as error:
                    assert f"Remove {root}; " in str(error)  # noqa: PT017
                    assert said
                else:
                    assert not said  # spaces of a zarr.json
            path.write_bytes(data)
    assert told > 40
    check_pack(cache, pack, set(ids))


def test_a_pack_under_another_name_is_refused(cache):
    pack = write_pack(cache, IDS, PIXELS)
    other = Path(cache.url) / "packs" / ("f" * 32)
    shutil.copytree(Path(cache.url) / pack.folder, other)
    with pytest.raises(CacheError, match=rf"{other}/zarr\.json is damaged \(.*is another object\)"):
        read_pack(cache, other.name)


def test_a_pack_that_differs_from_an_entry_is_found(cache):
    pack = write_pack(cache, IDS, PIXELS)
    shutil.rmtree(Path(cache.url) / "shards" / IDS[3])
    _write(cache, 3)
    check_pack(cache, pack, {IDS[3]})
    shutil.rmtree(Path(cache.url) / "shards" / IDS[3])
    cache.write(IDS[3], table(3), PIXELS, np.full((3, 2, 2), 2, np.float16))
    check_pack(cache, pack, {IDS[2]})
    with pytest.raises(CacheError, match=f"maps is damaged .shard {IDS[3]} has others"):
        check_pack(cache, pack, {IDS[3]})


def test_a_pack_is_of_use_while_most_of_it_is_named_and_in_no_larger_one(cache):
    large, small = write_pack(cache, IDS[:60], PIXELS), write_pack(cache, IDS[50:], PIXELS)
    assert useful_packs(cache, set(IDS)) == [large]  # half of the other one lies in it
    assert useful_packs(cache, set(IDS[40:])) == [small]
    assert useful_packs(cache, set(IDS[60:])) == []
    for number in range(SHARDS):
        _write(cache, number, OTHER)
    of_other = write_pack(cache, IDS[:60], OTHER)
    assert useful_packs(cache, set(IDS)) == [large, of_other]
