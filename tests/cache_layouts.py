"""Random caches, with what a collection must keep and must not touch, for its property test."""

import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from famt.pipeline.caching.cache import ScoreCache, ShardTable
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.storage import Version

SPECS = [ScoreSpec(kind=kind, grid=2) for kind in ("lowpass", "highpass")]


def table(count: int = 2) -> ShardTable:
    """A made-up table of so many samples."""
    numbers = np.arange(1, count + 1)
    keys = [f"{n}" for n in numbers]
    samples = np.stack([1024 * numbers, 500 + 0 * numbers, numbers], axis=1)
    return ShardTable(keys, samples, [], 10_000, None)


def maps(count: int = 2) -> np.ndarray:
    """Its maps."""
    return np.ones((count, 2, 2), np.float16)


@dataclass
class Layout:
    """A cache on disk and what has to be true after any collection.

    Attributes:
        keep: files that must stay as they are, because something needs them.
        foreign: files that are not the cache's.
        young: entries of which a file is younger than a collection's age limit.
        records: shards that must stay known: folder -> names.
    """

    cache: ScoreCache
    keep: set[Path] = field(default_factory=set)
    foreign: set[Path] = field(default_factory=set)
    young: set[Path] = field(default_factory=set)
    records: dict[str, set[str]] = field(default_factory=dict)


def make(root: Path, seed: int) -> Layout:
    """A layout below an empty folder."""
    rng = random.Random(seed)
    cache = ScoreCache(str(root / "cache"), create=True)
    layout = Layout(cache)
    home = Path(cache.url)
    ids = [f"{rng.getrandbits(128):032x}" for _ in range(rng.randint(2, 7))]
    for shard_id in ids:
        cache.write_table(shard_id, table())
        for spec in rng.sample(SPECS, rng.randint(0, 2)):
            cache.write(shard_id, table(), spec, maps())
        if rng.random() < 0.2:  # a remedy was followed, or a collection killed
            (home / "shards" / shard_id / "table.zip").unlink()
    for shard_id in _folders(rng, root, layout, ids):
        layout.keep |= set((home / "shards" / shard_id).glob("*.zip"))
    for path in sorted(home.rglob("*")):
        if path.is_file() and rng.random() < 0.9:
            os.utime(path, (time.time() - 1e6,) * 2)
        elif path.is_file():
            layout.young.add(path.parent)
    _add_foreign(rng, root, home, ids, layout)
    return layout


def _folders(rng: random.Random, root: Path, layout: Layout, ids: list[str]) -> set[str]:
    """Folders of tars with records; returns the shards that must stay known."""
    named = set()
    for number in range(rng.randint(0, 3)):
        folder = root / f"data {number}"
        folder.mkdir()
        records = {}
        for tar in range(rng.randint(1, 4)):
            name = rng.choice(["{}.tar", "ü {}.tar", "{}.tar#1"]).format(tar)
            records[name] = ShardRecord(Version(1, f"{tar}"), rng.choice(ids))
        layout.cache.manifests.publish({f"{folder}/{n}": r for n, r in records.items()})
        state = rng.choice(["there", "some", "some", "unmounted", "marker", "gone"])
        there = set(records) if state == "there" else set()
        if state == "some":
            there = set(rng.sample(sorted(records), rng.randint(1, len(records))))
        for name in there:
            if rng.random() < 0.3:
                (folder / name).symlink_to(root / "not mounted" / name)
            else:
                (folder / name).write_bytes(b"tar")
        if state == "marker":
            (folder / "NOT_MOUNTED").touch()
        if state == "gone":
            folder.rmdir()
        kept = there or set(records)
        layout.records[str(folder)] = kept
        named |= {records[name].shard_id for name in kept}
    return named


def _add_foreign(
    rng: random.Random, root: Path, home: Path, ids: list[str], layout: Layout
) -> None:
    """Files that are not the cache's, old ones, anywhere that a cache is not refused for."""
    entry = f"shards/{rng.choice(ids)}"
    places = [
        "", "my data/", "shards.bak/", f"{entry}/", f"{entry}/photos/", f"{entry}/table/",
        f"{entry}/{SPECS[0].id}/c/", "datasets/mine-0123456789ab/", "packs/mine/",
    ]  # fmt: skip
    names = [
        "a.tar", "train-000000.tar#1", "notes#12", "table.zip.bak", "1.json", "table.zip#",
        "photos.zip", "00000001.JSON", ".DS_Store", "ü #3", "model.pt", "zarr.json",
    ]  # fmt: skip
    for _ in range(rng.randint(0, 8)):
        path = home / (rng.choice(places) + rng.choice(names))
        if not path.exists() and not path.is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
            if rng.random() < 0.2:
                path.symlink_to(root / "not mounted")
            else:
                path.write_bytes(rng.randbytes(8))
                os.utime(path, (1, 1))
            layout.foreign.add(path)
