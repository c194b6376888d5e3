"""What the precompute keeps never ends an epoch, lies as DALI reads it, and adds up.

A program to run on seeds of one's own, which also prints counts by kind:

    FAMT_FUZZ_SEEDS=7,8,9 python -m pytest -s -m slow tests/pipeline/scoring/test_fuzz.py

`FAMT_PHOTOS` names a folder of JPEGs to damage in place of scikit-learn's two photos.

A map must not be turned against the pixels that DALI shows, and must correlate with theirs: by 0.8,
of damaged JPEGs by 0.5 (docs/decisions.md: plain JPEGs keep Pillow's scaled decode).
"""

import os
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
import sklearn.datasets
import torch
from hostile import METADATA, STRUCTURE, marked, picture
from hostile_tars import TARS
from PIL import Image
from samples import encode, photo_members, score, tar_bytes, write_tar

from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig, RandomView, WholeView
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.decode import decode
from famt.pipeline.scoring.precompute import precompute_shard
from famt.pipeline.scoring.publish import publish

SEEDS = [int(seed) for seed in os.environ.get("FAMT_FUZZ_SEEDS", "0").split(",")]
SPEC = ScoreSpec()


def _photos() -> list[bytes]:
    if "FAMT_PHOTOS" in os.environ:
        paths = sorted(Path(os.environ["FAMT_PHOTOS"]).rglob("*.[jJ][pP]*[gG]"))
        return [path.read_bytes() for path in paths[:200]]
    photos = []
    for photo in sklearn.datasets.load_sample_images().images:
        for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}):
            photos.append(encode(photo[::2, ::2], **options))
        photos.append(encode(photo[::3, ::3, 0], quality=60))  # grey
        photos.append(encode(Image.fromarray(photo[::3, ::3]).convert("CMYK")))
    return photos


def _flip_bits(data: bytes, other: bytes, chance: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 3, 20))):
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _flip_header_bits(data: bytes, other: bytes, chance: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 2, 5))):
        damaged[chance.randrange(min(700, len(data)))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _cut(data: bytes, other: bytes, chance: Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _drop_middle(data: bytes, other: bytes, chance: Random) -> bytes:
    a, b = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b:]


def _splice(data: bytes, other: bytes, chance: Random) -> bytes:
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


def _swap_header(data: bytes, other: bytes, chance: Random) -> bytes:
    length = chance.randrange(2, 900)
    return other[:length] + data[length:]


def _noise(data: bytes, other: bytes, chance: Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + chance.randbytes(chance.randrange(1, 400)) + data[start + 200 :]


MUTATIONS = (_flip_bits, _flip_header_bits, _cut, _drop_middle, _splice, _swap_header, _noise)


def _damaged(chance: Random, each: int) -> dict[str, list[bytes]]:
    """Files whose bytes are damaged, `each` of a mutation for JPEG, an eighth of it for others."""
    photos = _photos()
    others = {kind: [picture(chance, kind) for _ in range(3)] for kind in ("PNG", "WEBP")}
    return {
        f"{kind} {mutate.__name__.lstrip('_')}": [
            mutate(chance.choice(files), chance.choice(files), chance)
            for _ in range(each if kind == "JPEG" else -(-each // 8))
        ]
        for kind, files in {"JPEG": photos, **others}.items()
        for mutate in MUTATIONS
    }


def _images(seed: int, each: int) -> dict[str, list[bytes]]:
    chance = Random(seed)
    made = _damaged(chance, 2 * each)
    for kind, make in {**METADATA, **STRUCTURE}.items():
        made[kind] = [make(chance) for _ in range(each)]
    return made


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("each", [4, pytest.param(91, marks=pytest.mark.slow)])
def test_images_that_are_kept_decode_in_dali_and_have_their_maps_on_their_crops(
    tmp_path, cache, seed, each
):
    made = _images(seed, each)
    files = {f"{kind} {n}": data for kind, many in made.items() for n, data in enumerate(many)}
    files["whole"] = encode(marked(Random(0)))
    path = write_tar(tmp_path / "odd.tar", [(f"{key}.jpg", data) for key, data in files.items()])
    score([path], cache, SPEC)
    table = load_samples([str(path)], cache)
    maps = load_maps(table, cache, SPEC)
    rejected = cache.read_table(table.shard_ids[0]).rejected
    assert len(table) + len(rejected) == len(files)
    keys = table.keys(0)
    kept = Counter(key.rpartition(" ")[0] for key in keys)
    off, strange = defaultdict(list), defaultdict(list)
    for crops in _epoch(table, WholeView(), SPEC.size):
        scores = SPEC.score(crops.images)
        for row, pixels, seen in zip(crops.rows.tolist(), crops.images, scores, strict=True):
            stored = maps[row].float()
            kind = keys[row].rpartition(" ")[0]
            is_other = _correlation(stored, seen) < (0.5 if kind.startswith("JPEG ") else 0.8)
            if _is_turned(stored, seen) or (is_other and not _is_of(files[keys[row]], pixels)):
                off[kind].append(keys[row])
    for crops in _epoch(table, RandomView(area=(0.05, 1.0)), 32):
        rows = zip(crops.rows.tolist(), crops.images, crops.windows, crops.flips, strict=True)
        for row, pixels, window, flip in rows:
            kind = keys[row].rpartition(" ")[0]
            if kind in METADATA and not _shows(files[keys[row]], pixels, window, bool(flip)):
                strange[kind].append(keys[row])
    print(f"\nseed {seed}: {len(files)} images, {len(table)} kept, {len(rejected)} quarantined")
    for kind, many in made.items():
        print(f"  {kind}: {len(many)} made, {kept[kind]} kept, {len(off[kind])} off their crop")
    assert not any(off.values()), dict(off)
    assert not any(strange.values()), dict(strange)


def _epoch(table, view, size):
    """One epoch; that it ends is part of the test. The error names the image if it does not."""
    config = LoaderConfig(
        16, image_size=size, view=view, interpolation="bilinear", shuffle_buffer=0, threads=2
    )
    rows = []
    for crops in CropLoader(table, config, drop_last=False):
        rows += crops.rows.tolist()
        yield crops
    assert rows == list(range(len(table)))


def _correlation(stored: torch.Tensor, seen: torch.Tensor) -> float:
    """1 where either is the same everywhere."""
    pair = torch.stack([stored, seen]).flatten(1)
    return float(torch.corrcoef(pair)[0, 1]) if (pair.std(1) > 0.01).all() else 1.0


def _is_of(data: bytes, pixels: torch.Tensor) -> bool:
    """Whether the pixels that were scored are DALI's, but for how each enlarges a few pixels."""
    scored = decode(data, SPEC.size).astype(float)
    return bool(np.abs(scored - pixels.numpy()).mean() < 2)


def _is_turned(stored: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether a map fits better when it is turned or flipped."""
    turned = [torch.rot90(each, quarters) for each in (seen, seen.flip(1)) for quarters in range(4)]
    upright, *others = [float((stored - each).abs().mean()) for each in turned]
    return upright > 0.2 and min(others) < 0.6 * upright


def _shows(data: bytes, crop: torch.Tensor, window: torch.Tensor, flip: bool) -> bool:
    """Whether a crop is the piece of the image that its window says."""
    side = 256
    top, left, height, width = (side * window).tolist()
    whole = Image.fromarray(decode(data, side))
    box = (max(0.0, left), max(0.0, top), min(side, left + width), min(side, top + height))
    expected = np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR, box=box)).astype(int)
    expected = expected[:, ::-1] if flip else expected
    return bool(np.abs(expected - crop.numpy()).mean() < 12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("each", [1, pytest.param(13, marks=pytest.mark.slow)])
def test_of_malformed_tars_nothing_is_lost_silently_or_gets_a_wrong_class(
    tmp_path, cache, seed, each
):
    chance = Random(seed)
    reports, truth, counts = [], {}, Counter()
    for kind, make in TARS.items():
        for n in range(each):
            samples = [
                (f"k{n}", encode(marked(chance), quality=chance.randrange(60, 96)), 10 + n)
                for n in range(5)
            ]
            path = tmp_path / f"{kind}-{n}.tar"
            path.write_bytes(make(chance, samples))
            try:
                report = precompute_shard(str(path), cache, SPEC)
            except UserError as error:
                if f"{path}: no image in it" not in str(error):
                    raise
                counts[kind, "refused"] += 1
                continue
            # A name may lose its ending to a flipped bit.
            named = report.kept + report.quarantined + sum(report.passed_over.values())
            assert named >= len(samples) or report.damage, f"{path}: only {named} of its samples"
            reports.append(report)
            truth |= {(str(path), image): label for _, image, label in samples}
            counts[kind, "damaged" if report.damage else "whole"] += 1
            counts[kind, "kept"] += report.kept
            counts[kind, "quarantined"] += report.quarantined
    publish(reports, cache, SPEC)
    urls = [report.url for report in reports if report.kept]
    table = load_samples(urls, cache)
    for shard, url in enumerate(table.urls):
        data = Path(url).read_bytes()
        for offset, size, label in cache.read_samples(table.shard_ids[shard]):
            image = data[offset : offset + size]
            assert truth[url, image] == label, url
    for _ in _epoch(table, WholeView(), 16):
        pass
    print(f"\nseed {seed}: {len(TARS) * each} tars")
    for (kind, what), count in sorted(counts.items()):
        print(f"  {kind}: {count} {what}")


def _odd_name(chance: Random) -> str:
    odd = " !\"#$%&'()*+,:;<=>?@[\\]^_`{|}~äß日本\n\té"
    return "".join(chance.choice(odd + "abc019.-") for _ in range(chance.randrange(1, 12)))


@pytest.mark.parametrize("seed", SEEDS)
def test_tars_of_odd_names_are_scored_and_trained_on(tmp_path, cache, seed):
    chance = Random(seed)
    folder = tmp_path / "odd"
    folder.mkdir()
    names = {f"{n}{_odd_name(chance)}.tar" for n in range(35)}
    for n, name in enumerate(sorted(names)):
        (folder / name).write_bytes(tar_bytes(photo_members(2, 2 * n)))
    score([folder / name for name in sorted(names)], cache, SPEC)
    table = load_samples([str(folder)], cache)
    assert table.urls == sorted(f"{folder}/{name}" for name in names)
    assert load_samples(table.urls, cache).urls == table.urls  # one by one, as patterns
    assert sum(len(crops.rows) for crops in _epoch(table, WholeView(), 16)) == 70
