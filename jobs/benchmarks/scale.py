"""What many shards cost at start."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from tqdm import tqdm

from jobs import precompute_freq
from jobs.benchmarks import measure
from jobs.benchmarks.measure import Report
from pipeline import storage
from pipeline.cache import ScoreCache, ShardTable
from pipeline.manifest import ShardRecord
from pipeline.options import Checked
from pipeline.scores import ScoreSpec
from pipeline.table import load_maps, load_samples


@dataclass(frozen=True)
class Scale(Checked):
    """What many shards cost at start: time and memory to resolve and load a large made-up cache."""

    shards: Annotated[int, Ge(1)] = 20_000
    """shards of the made-up data set, each its own entry"""
    images_per_shard: Annotated[int, Ge(1)] = 20
    """rows of each entry; the time goes by shards, the memory by images"""

    def run(self) -> Iterator[Report]:
        spec = ScoreSpec()
        with tempfile.TemporaryDirectory(prefix="famt-scale-") as folder:
            cache = ScoreCache(f"{folder}/cache", create=True)
            maps = np.ones((self.images_per_shard, spec.grid, spec.grid), np.float16)
            table = ShardTable(
                key=[f"image-{n:08d}" for n in range(self.images_per_shard)],
                offset=np.arange(self.images_per_shard) * 110_000,
                size=np.full(self.images_per_shard, 109_000),
                label=np.arange(self.images_per_shard),
                rejected=[],
                bytes=self.images_per_shard * 110_000,
                damage=None,
            )
            Path(folder, "shards").mkdir()
            records, seconds = {}, {}
            started = time.perf_counter()
            for number in tqdm(range(self.shards), desc="entries", unit="shard"):
                path = Path(folder, "shards", f"train-{number:06d}.tar")
                path.touch()
                shard_id = f"{number:032x}"
                cache.write(shard_id, table, spec, maps)
                records[str(path)] = ShardRecord(storage.version(str(path)), shard_id)
            seconds["write"] = time.perf_counter() - started
            cache.manifests.publish(records)
            before = measure.resident_bytes()
            started = time.perf_counter()
            loaded = load_samples([f"{folder}/shards"], cache)
            loaded_maps = load_maps(loaded, cache, spec)
            seconds["load"] = time.perf_counter() - started
            memory = measure.resident_bytes() - before
            started = time.perf_counter()
            with loaded.write_indices():
                seconds["index"] = time.perf_counter() - started
            started = time.perf_counter()
            done = precompute_freq.main(
                precompute_freq.PrecomputeFreq([f"{folder}/shards"], cache.url)
            )
            seconds["second_precompute"] = time.perf_counter() - started
            entries = list(cache.entries())
            images = self.shards * self.images_per_shard
            yield {
                **measure.line(
                    "scale",
                    f"MB of memory that the table of {images} images takes",
                    memory / 1e6,
                    "MB of its score maps alone",
                    loaded_maps.nbytes / 1e6,
                ),
                "shards": self.shards,
                "seconds": {name: round(each, 2) for name, each in seconds.items()},
                "second_precompute_exit_code": done,
                "objects": sum(entry.objects for entry in entries),
                "stored_bytes_per_shard": round(sum(e.bytes for e in entries) / self.shards),
            }
