import zipfile

import numpy as np
import pytest
import torch

from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.scoring.generation import (
    GenerationError,
    generation_path,
    newest_generation,
    open_generation,
    write_generation,
)

KINDS = ["attention", "token_frequency"]


@pytest.fixture
def maps(table):
    generator = np.random.default_rng(0)
    return {
        ModelScoreSpec(kind, 8, 32, "e"): generator.random((len(table), 8, 8)).astype(np.float16)
        for kind in KINDS
    }


@pytest.fixture
def path(table, maps, tmp_path):
    path = generation_path(tmp_path / "refresh", 7)
    write_generation(path, "run-a", table.digest, maps)
    return path


def test_what_was_written_is_read(path, table, maps):
    generation = open_generation(path)
    assert (generation.run, generation.step) == ("run-a", 7)
    read = generation.maps(table, KINDS, 8)
    for spec, each in maps.items():
        assert torch.equal(read[spec.kind], torch.from_numpy(each))
    assert list(generation.maps(table, KINDS[:1], 8)) == KINDS[:1]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_path_names_a_generation_or_the_folder_of_the_newest(path, table, maps):
    write_generation(generation_path(path.parent, 12), "run-a", table.digest, maps)
    assert newest_generation(path.parent).step == 12
    assert newest_generation(path).step == 7


@pytest.mark.parametrize(
    ("kinds", "grid", "shards", "why"),
    [
        (KINDS, 8, 2, "scores other images"),
        (["cls_attention"], 8, 3, "has no scores of kind cls_attention"),
        (KINDS, 14, 3, "has 8 cells a side, and the crops have 14"),
    ],
)
def test_other_images_kinds_and_grids_are_refused(path, scored, kinds, grid, shards, why):
    table = load_samples(scored.shards[:shards], scored.cache)
    with pytest.raises(GenerationError, match=rf"generation-00000007\.zip {why}.*famt refresh"):
        open_generation(path).maps(table, kinds, grid)


@pytest.mark.parametrize("name", ["generation-00000008.zip", "generation-8.zip", "other.zip", ""])
def test_a_path_without_a_generation_is_named_with_a_remedy(path, name):
    with pytest.raises(GenerationError, match=rf"{path.parent / name}.*`famt refresh --out"):
        newest_generation(path.parent / name if name else path.parent / "none")


def _read(path, table):
    return open_generation(path).maps(table, KINDS, 8)


def test_no_flipped_byte_is_believed(path, table, maps):
    whole = path.read_bytes()
    expected = _read(path, table)
    chance = np.random.default_rng(0)
    refused = 0
    for at in chance.choice(len(whole), 100, replace=False):
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << chance.integers(8))]) + whole[at + 1 :]
        )
        try:
            read = _read(path, table)
        except GenerationError:
            refused += 1
        else:  # a time of writing, say
            assert all(torch.equal(read[kind], expected[kind]) for kind in KINDS)
    assert refused > 60


def _without_a_chunk(path):
    whole = path.rename(path.with_name("whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            if name != "attention/c/0/0/0":
                copy.writestr(name, source.read(name))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        _without_a_chunk,
    ],
)
def test_damage_is_named_with_the_remedy(path, table, damage):
    damage(path)
    with pytest.raises(GenerationError, match=r"generation-00000007\.zip is damaged.*Remove it"):
        _read(path, table)


def test_a_name_that_is_not_the_generations_own_is_damage(path):
    renamed = path.rename(generation_path(path.parent, 5))
    with pytest.raises(GenerationError, match=r"is damaged \(it is of step 7\)"):
        open_generation(renamed)


def test_a_write_that_fails_leaves_nothing_and_the_next_removes_what_a_kill_left(
    path, table, maps, monkeypatch
):
    left = path.with_name("generation-00000005.zip.0a.part")
    left.write_bytes(b"half")
    newer = path.with_name("generation-00000012.zip.0b.part")
    newer.write_bytes(b"half")

    def full(file):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    whole = path.read_bytes()
    with pytest.raises(OSError, match="no space left"):
        write_generation(path, "run-b", table.digest, maps)
    assert path.read_bytes() == whole
    assert {each.name for each in path.parent.iterdir()} == {path.name, newer.name}
