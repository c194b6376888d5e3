"""Look after a score cache.

    python jobs/cache.py ls --cache scores             # folders, images, scores, sizes
    python jobs/cache.py ls --cache scores --bad       # every quarantined sample, with the reason
    python jobs/cache.py verify --cache scores --sample 20
    python jobs/cache.py gc --cache scores --dry-run
    python jobs/cache.py show --cache scores --shards 'shards/val-*.tar' --out maps.png

Exit code: 0 all is well; 1 `verify` found an entry that its tar contradicts, or `gc` could not look
into a folder of shards.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from pipeline import storage
from pipeline.cache import ScoreCache
from pipeline.loader import CropLoader, LoaderConfig, WholeView
from pipeline.manifest import CacheError, ShardRecord
from pipeline.precompute import score_shard
from pipeline.scores import ScoreSpec, is_generation
from pipeline.shards import content_id
from pipeline.table import load_maps, load_samples
from train.figures import draw
from train.program import run_program


@dataclass(frozen=True)
class Ls:
    """List what the cache holds: a block for each folder of shards that it knows."""

    cache: str
    """folder or object-store URL of the score cache"""
    bad: bool = False
    """print every quarantined sample and damaged tar instead, one a line"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        stored = {entry.shard_id: entry for entry in cache.entries()}
        for folder, records in sorted(cache.manifests.folders().items()):
            whole = {
                name: record.shard_id
                for name, record in sorted(records.items())
                if record.shard_id in stored and stored[record.shard_id].whole
            }
            with ThreadPoolExecutor(32) as pool:
                summaries = dict(zip(whole, pool.map(cache.summary, whole.values()), strict=True))
            if self.bad:
                for name, summary in summaries.items():
                    if summary.damage:
                        print(f"{folder}/{name}: {summary.damage}")
                    for rejected in summary.rejected:
                        print(f"{folder}/{name}:{rejected.key}: {rejected.reason}")
                continue
            specs = Counter(spec for shard_id in whole.values() for spec in stored[shard_id].specs)
            kept = sum(summary.kept for summary in summaries.values())
            bad = sum(len(summary.rejected) for summary in summaries.values())
            size = sum(stored[shard_id].bytes for shard_id in set(whole.values()))
            print(folder)
            print(f"  {len(whole)} of {len(records)} shards whole, {_size(size)} of scores")
            print(f"  {kept} images kept, {bad} quarantined")
            for spec, shards in specs.most_common():
                print(f"  {spec}: {shards} shards ({shards / max(1, len(records)):.0%})")
        for run in [] if self.bad else cache.generations.runs():
            superseded = cache.generations.superseded(run)
            for each in cache.generations.of(run):
                state = "superseded" if each in superseded else "in use or newest"
                print(
                    f"generation {run}/{each.step}: {each.spec.id}, {each.images} images, {state}"
                )
        return 0


@dataclass(frozen=True)
class Verify:
    """Score a sample of entries again from their tars, and compare."""

    cache: str
    """folder or object-store URL of the score cache"""
    sample: int = 10
    """entries to check; each is one tar to read and score"""
    seed: int = 0
    """of the choice"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        known = [
            (f"{folder}/{name}", record)
            for folder, records in sorted(cache.manifests.folders().items())
            for name, record in sorted(records.items())
        ]
        chosen = random.Random(self.seed).sample(known, min(self.sample, len(known)))
        stored = {entry.shard_id: entry for entry in cache.entries()}
        wrong = 0
        for url, record in tqdm(chosen, desc="verify", unit="shard"):
            entry = stored.get(record.shard_id)
            # What a model gave can't be had from the tar alone.
            specs = [each for each in entry.specs if not is_generation(each)] if entry else []
            whole = entry is not None and entry.whole
            problem = _contradiction(cache, url, record, specs) if whole else "no whole entry"
            if problem:
                wrong += 1
                tqdm.write(f"{url}: {problem}")
        print(f"{len(chosen) - wrong} of {len(chosen)} entries agree with their tars")
        return 1 if wrong else 0


@dataclass(frozen=True)
class Gc:
    """Remove what no shard needs any more, and what killed writers left behind.

    That is: records of shards that were deleted, entries that no record names, generations that no
    run needs and maps of none, entries and maps that were never finished, and staging files.
    """

    cache: str
    """folder or object-store URL of the score cache"""
    older_than_hours: float = 24.0
    """leave newer ones: a job in progress has entries that no manifest names yet"""
    drop_runs: list[str] = field(default_factory=list)
    """training runs whose generations all go, the newest too"""
    dry_run: bool = False
    """only say what would go"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        # Entries are listed before manifests are read: what is published meanwhile stays.
        entries = list(cache.entries())
        named, unseen = self._forget_deleted_shards(cache)
        generations = self._forget_superseded_generations(cache)
        limit = datetime.now(UTC) - timedelta(hours=self.older_than_hours)
        freed = 0
        for entry in entries:
            if entry.whole and entry.shard_id in named:
                for maps in entry.maps:
                    orphan = is_generation(maps.spec_id) and maps.spec_id not in generations
                    if maps.modified <= limit and (orphan or not maps.whole):
                        reason = "unfinished" if not maps.whole else "of no generation"
                        print(f"{entry.shard_id}/{maps.spec_id}: {_size(maps.bytes)}, {reason}")
                        freed += maps.bytes
                        if not self.dry_run:
                            cache.remove(entry.shard_id, maps.spec_id, limit=limit)
            elif entry.modified <= limit:
                reason = "no manifest names it" if entry.whole else "only partly written"
                print(f"{entry.shard_id}: {_size(entry.bytes)}, {reason}")
                freed += entry.bytes
                if not self.dry_run:
                    cache.remove(entry.shard_id, limit=limit)
        for file in storage.staging_files(cache.url):
            if file.modified <= limit:
                print(f"{file.path}: {_size(file.bytes)}, a staging file")
                freed += file.bytes
                if not self.dry_run:
                    file.path.unlink(missing_ok=True)
        print(f"{_size(freed)} {'would be ' if self.dry_run else ''}freed")
        return 1 if unseen else 0

    def _forget_superseded_generations(self, cache: ScoreCache) -> set[str]:
        """Drop generations that no run needs; returns the spec ids of those that stay."""
        named = set()
        for run in cache.generations.runs():
            dropped = run in self.drop_runs
            old = cache.generations.of(run) if dropped else cache.generations.superseded(run)
            for generation in old:
                print(f"generation {run}/{generation.step}: no run needs it")
                if not self.dry_run:
                    cache.generations.forget(generation)
            if dropped and not self.dry_run:
                cache.generations.drop(run)
            named |= {each.spec.id for each in cache.generations.of(run) if each not in old}
        return named

    def _forget_deleted_shards(self, cache: ScoreCache) -> tuple[set[str], list[str]]:
        """Drop records of tars that are gone; returns the shard ids still named, and the folders
        that could not be looked into: their records stay."""
        named: set[str] = set()
        unseen = []
        # A folder is listed after its manifest is read: a tar that is not there then was deleted.
        for folder, records in sorted(cache.manifests.folders().items()):
            gone: dict[str, ShardRecord] = {}
            try:
                present = storage.list_names(folder)
                if records and not present and not storage.is_remote(folder):
                    raise OSError(f"{folder} is empty, as if its disk were not mounted")
                gone = {name: record for name, record in records.items() if name not in present}
            except OSError as error:
                unseen.append(folder)
                print(
                    f"{error}; its {len(records)} shards keep their scores. If it was deleted for "
                    f"good, remove {cache.url}/{cache.manifests.path(folder)}",
                    file=sys.stderr,
                )
            for name in sorted(gone):
                print(f"{folder}/{name}: the tar is gone, its record goes")
            if gone and not self.dry_run:
                cache.manifests.forget(folder, gone)
            named |= {record.shard_id for name, record in records.items() if name not in gone}
        return named, unseen


@dataclass(frozen=True)
class Show:
    """Draw photos with their score maps."""

    cache: str
    """folder or object-store URL of the score cache"""
    shards: list[str]
    """where the photos come from"""
    out: Path
    """PNG file to write"""
    images: int = 6
    """rows of the picture"""
    spec: ScoreSpec = field(default_factory=ScoreSpec)
    seed: int = 0
    """of the choice of photos"""

    def run(self) -> int:
        cache = ScoreCache(self.cache)
        table = load_samples(self.shards, cache)
        config = LoaderConfig(batch_size=min(self.images, len(table)), view=WholeView(), threads=1)
        crops = next(iter(CropLoader(table, config, drop_last=True, seed=self.seed)))
        maps = load_maps(table, cache, self.spec)[crops.rows].float().numpy()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        draw({"photo": crops.images.numpy(), self.spec.kind: maps}).save(self.out)
        print(self.out)
        return 0


Command = (
    Annotated[Ls, tyro.conf.subcommand("ls")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Gc, tyro.conf.subcommand("gc")]
    | Annotated[Show, tyro.conf.subcommand("show")]
)


def main(command: Command) -> int:
    """Run one command; see the module's docstring for the exit code."""
    return command.run()


def _contradiction(
    cache: ScoreCache, url: str, record: ShardRecord, specs: list[str]
) -> str | None:
    """What the tar at `url` says against its entry, or None."""
    shard_id = record.shard_id
    if not storage.exists(url):
        return "the tar is gone"
    data = storage.read(url)
    if content_id(data) != shard_id:
        return "the tar has changed since it was scored; run jobs/precompute_freq.py again"
    for spec_id in specs:
        spec = cache.stored_spec(shard_id, spec_id)
        if spec is None:
            tqdm.write(f"{url}: {spec_id} is not checked, other code wrote it")
            continue
        try:
            scored, table = score_shard(data, spec, url), cache.read_table(shard_id)
            maps = cache.read_maps([shard_id], spec)[0]
        except CacheError as error:
            return str(error)
        if scored.table.key != table.key or not all(
            np.array_equal(getattr(scored.table, name), getattr(table, name))
            for name in ("offset", "size", "label")
        ):
            return "other samples than in the tar"
        # Another machine may round otherwise: one part in a thousand is a float16's own error.
        difference = np.abs(maps.astype(np.float32) - scored.maps.astype(np.float32))
        if difference.size and difference.max() > 1e-2:
            return f"{spec_id}: maps differ by up to {difference.max():.3g}"
    return None


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    run_program(main, tyro.cli(Command, description=__doc__))  # type: ignore[arg-type]
