"""What the precompute keeps never kills DALI: damaged photos through the whole path.

`FAMT_PHOTOS` names a folder of JPEGs to damage in place of scikit-learn's two photos, and
`FAMT_MUTANTS` says how many to make.
"""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import sklearn.datasets
from PIL import Image
from samples import encode, score, tar_bytes

from pipeline.cache import ScoreCache
from pipeline.loader import CropLoader, LoaderConfig, RandomView, WholeView
from pipeline.scores import ScoreSpec
from pipeline.table import load_samples


def _photos():
    if "FAMT_PHOTOS" in os.environ:
        paths = sorted(Path(os.environ["FAMT_PHOTOS"]).rglob("*.[jJ][pP]*[gG]"))
        return [path.read_bytes() for path in paths[:200]]
    photos = []
    for picture in sklearn.datasets.load_sample_images().images:
        for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}):
            photos.append(encode(picture, **options))
        photos.append(encode(picture[::3, ::3, 0], quality=60))  # grey
        cmyk = Image.fromarray(picture[::2, ::2]).convert("CMYK")
        photos.append(encode(cmyk))
    return photos


def _flip_bits(data, other, chance):
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 3, 20))):
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _flip_header_bits(data, other, chance):
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 2, 5))):
        damaged[chance.randrange(min(700, len(data)))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _cut(data, other, chance):
    return data[: chance.randrange(len(data))]


def _drop_middle(data, other, chance):
    a, b = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b:]


def _splice(data, other, chance):
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


def _swap_header(data, other, chance):
    length = chance.randrange(2, 900)
    return other[:length] + data[length:]


def _noise(data, other, chance):
    start = chance.randrange(len(data))
    return data[:start] + chance.randbytes(chance.randrange(1, 400)) + data[start + 200 :]


MUTATIONS = (_flip_bits, _flip_header_bits, _cut, _drop_middle, _splice, _swap_header, _noise)


@pytest.mark.parametrize(
    "mutants",
    [60, pytest.param(int(os.environ.get("FAMT_MUTANTS", "2000")), marks=pytest.mark.slow)],
)
def test_damaged_photos_that_are_kept_decode_in_the_loader(tmp_path, mutants):
    chance, photos = random.Random(0), _photos()
    members, made = [], Counter()
    for n in range(mutants):
        mutate = MUTATIONS[n % len(MUTATIONS)]
        made[mutate.__name__] += 1
        damaged = mutate(chance.choice(photos), chance.choice(photos), chance)
        members.append((f"{mutate.__name__}-{n}.jpg", damaged))
    members.append(("whole.jpg", photos[0]))
    path = tmp_path / "mutants.tar"
    path.write_bytes(tar_bytes(members))
    spec = ScoreSpec()
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    score([path], cache, spec)
    table = load_samples([str(path)], cache)
    (entry,) = cache.entries()
    rejected = cache.summary(entry.shard_id).rejected
    assert len(table) + len(rejected) == mutants + 1
    assert 0 < len(rejected) < mutants
    kept = Counter(table.key(row).rpartition(":")[2].partition("-")[0] for row in range(len(table)))
    print(f"{mutants} mutants: {len(table) - 1} kept, {len(rejected)} quarantined; kept {kept}")
    for view in (WholeView(), RandomView(area=(0.05, 1.0))):
        config = LoaderConfig(batch_size=16, image_size=64, view=view, shuffle_buffer=0, threads=2)
        loader = CropLoader(table, config, drop_last=False)
        rows = [row for crops in loader for row in crops.rows.tolist()]
        assert rows == list(range(len(table)))
