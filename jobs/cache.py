"""Inspect, verify and clean a score cache.

    famt cache ls --cache scores             # folders, images, scores, sizes
    famt cache ls --cache scores --bad       # every quarantined sample, with the reason
    famt cache verify --cache scores --sample 20
    famt cache gc --cache scores --dry-run
    famt cache show --cache scores --shards 'shards/val-*.tar' --out maps.png

Exit code: 0 all is well; 1 `verify` found an entry that disagrees with its tar, or `gc` could not
list a folder of shards.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from tqdm import tqdm

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.gc import KEPT, collect
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import Checked, LoaderConfig, Seed, WholeView
from famt.pipeline.progress import progress_bar
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import score_shard
from famt.pipeline.sharding.shards import content_id, judgement_ids
from famt.pipeline.storage import each_at_once
from famt.pipeline.wording import counted
from famt.train.command_line import parsed, run_program
from famt.train.picture import draw


@dataclass(frozen=True)
class Ls:
    """List shards, images, scores and sizes for each folder of shards in the cache."""

    cache: str
    """folder or object-store URL of the score cache"""
    bad: bool = False
    """list quarantined samples and damaged tars instead, one a line"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        stored = {entry.shard_id: entry for entry in cache.entries()}
        for folder, records in sorted(cache.manifests.folders().items()):
            known = {
                name: record.shard_id
                for name, record in sorted(records.items())
                if record.shard_id in stored and stored[record.shard_id].table
            }
            tables = dict(
                zip(known, each_at_once(cache.read_table, list(known.values())), strict=True)
            )
            if self.bad:
                for name, table in tables.items():
                    if table.damage:
                        print(f"{folder}/{name}: {table.damage}")
                    for rejected in table.rejected:
                        print(f"{folder}/{name}:{rejected.key}: {rejected.reason}")
                continue
            specs = Counter(spec for shard_id in known.values() for spec in stored[shard_id].specs)
            kept = sum(table.kept for table in tables.values())
            bad = sum(len(table.rejected) for table in tables.values())
            size = sum(stored[shard_id].bytes for shard_id in set(known.values()))
            print(folder)
            print(f"  {len(known)} of {counted(len(records), 'shard')}, {_size(size)} of scores")
            print(f"  {counted(kept, 'image')} kept, {bad} quarantined")
            for spec, shards in specs.most_common():
                print(f"  {spec}: {counted(shards, 'shard')} ({shards / max(1, len(records)):.0%})")
        return 0


@dataclass(frozen=True)
class Verify(Checked):
    """Score a random sample of tars again, and compare with the cache."""

    cache: str
    """folder or object-store URL of the score cache"""
    sample: Annotated[int, Ge(1)] = 10
    """number of tars to read and score"""
    seed: Seed = 0
    """seed of the choice"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        known = [
            (storage.join_url(folder, name), record)
            for folder, records in sorted(cache.manifests.folders().items())
            for name, record in sorted(records.items())
        ]
        chosen = random.Random(self.seed).sample(known, min(self.sample, len(known)))
        stored = {entry.shard_id: entry for entry in cache.entries()}
        wrong = 0
        for url, record in progress_bar(chosen, desc="verify", unit="shard"):
            entry = stored.get(record.shard_id)
            try:
                specs = entry.specs if entry else []
                problem = _contradiction(cache, url, record, specs)
            except (CacheError, UserError, ValueError, *storage.UNREACHABLE) as error:
                problem = storage.reason(error)
            if problem:
                wrong += 1
                tqdm.write(f"{url}: {problem}")
        print(f"{len(chosen) - wrong} of {len(chosen)} entries agree with their tars")
        return 1 if wrong else 0


@dataclass(frozen=True)
class Gc(Checked):
    """Remove what no shard needs: records of deleted shards, entries without a record, and
    temporary files of killed writers.
    """

    cache: str
    """folder or object-store URL of the score cache"""
    days: Annotated[float, Ge(0), Le(1e5)] = KEPT.days
    """keep what is younger: running jobs have entries without a record"""
    dry_run: bool = False
    """only list what would be removed"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        out_of_reach: dict[str, str] = {}
        freed, age = 0, timedelta(days=self.days)
        for removed in collect(cache, age, dry_run=self.dry_run, out_of_reach=out_of_reach):
            size = f"{_size(removed.bytes)}, " if removed.bytes else ""
            print(f"{removed.what}: {size}{removed.reason}")
            freed += removed.bytes
        for folder, reason in out_of_reach.items():
            print(
                f"{reason}; its shards keep their scores. If the folder is gone for good, "
                f"remove {cache.url}/{cache.manifests.path(folder)}",
                file=sys.stderr,
            )
        print(f"{_size(freed)} {'would be ' if self.dry_run else ''}freed")
        return 1 if out_of_reach else 0


@dataclass(frozen=True)
class Show(Checked):
    """Draw images with their score maps."""

    cache: str
    """folder or object-store URL of the score cache"""
    shards: list[str]
    """tars with the images"""
    out: Path
    """PNG file to write"""
    images: Annotated[int, Ge(1)] = 6
    """number of images"""
    spec: ScoreSpec = field(default_factory=ScoreSpec)
    seed: Seed = 0
    """seed of the choice"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        table = load_samples(self.shards, cache, self.spec)
        config = LoaderConfig(batch_size=min(self.images, len(table)), view=WholeView(), threads=1)
        crops = next(iter(CropLoader(table, config, drop_last=True, seed=self.seed)))
        maps = load_maps(table, cache, self.spec)[crops.rows].float().numpy()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        draw({"photo": crops.images.numpy(), self.spec.kind: maps}).save(self.out)
        print(self.out)
        return 0


Command = Ls | Verify | Gc | Show


def main(command: Command) -> int:
    """Run one command; see the module's docstring for the exit code."""
    return command.run()


def _contradiction(
    cache: ScoreCache, url: str, record: ShardRecord, specs: list[str]
) -> str | None:
    """Reason why the tar at `url` disagrees with its entry, or None."""
    shard_id = record.shard_id
    try:
        data = storage.read(url)
    except FileNotFoundError:
        return "the tar is gone"
    if shard_id not in judgement_ids(content_id(data)):
        return "the tar has changed since it was scored; run `famt score` again"
    table = cache.read_table(shard_id)
    for spec_id in specs:
        spec = cache.stored_spec(shard_id, spec_id)
        if spec is None:
            tqdm.write(f"{url}: {spec_id} is not checked, other code wrote it")
            continue
        maps = cache.read_maps(shard_id, spec).astype(np.float32)
        scored = score_shard(data, spec, url)
        if not scored.table.same_rows(table):
            return "other samples than in the tar"
        # float16 rounds to one part in a thousand, and machines round differently.
        difference = np.abs(maps - scored.maps.astype(np.float32))
        if not (difference <= 1e-2).all():
            return f"{spec_id}: maps differ by up to {difference.max():.3g}"
    return None


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    run_program(main, parsed(Command, __doc__))
