"""Time and memory that a large cache costs at the start of a run."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from famt.jobs import cache as cache_command
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.options import PrecomputeFreq
from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache, ShardTable
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.options import Checked
from famt.pipeline.progress import progress_bar
from famt.pipeline.scores import ScoreSpec


@dataclass(frozen=True)
class Scale(Checked):
    """Many shards: time to start a run on a synthetic cache, and memory of its table."""

    shards: Annotated[int, Ge(1)] = 20_000
    """shards, each an entry of the cache"""
    images_per_shard: Annotated[int, Ge(1)] = 20
    """rows of an entry; time grows with shards, memory with images"""

    def run(self) -> Iterator[Report]:
        from famt.jobs import precompute_freq  # Ray, which other benchmarks run without

        spec, images, seconds = ScoreSpec(), self.shards * self.images_per_shard, {}

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            seconds[name] = round(time.perf_counter() - started, 2)

        with tempfile.TemporaryDirectory(prefix="famt-scale-") as folder:
            cache = ScoreCache(f"{folder}/cache", create=True)
            with timed("write"):
                self._fill(cache, Path(folder, "shards"), spec)
            before = _resident_bytes()
            with timed("rows"):
                samples = load_samples([f"{folder}/shards"], cache, spec)
            with timed("maps"):
                maps = load_maps(samples, cache, spec)
            with timed("index"), tempfile.TemporaryDirectory(prefix="famt-index-") as indices:
                samples.write_indices(Path(indices), range(len(samples)))
            memory = _resident_bytes() - before
            commands: dict[str, Callable[[], int]] = {
                "precompute_with_nothing_to_do": lambda: precompute_freq.main(
                    PrecomputeFreq([f"{folder}/shards"], cache.url)
                ),
                "ls": cache_command.Ls(cache.url).run,
                "gc": cache_command.Gc(cache.url, days=0).run,
            }
            codes = {}
            for name, command in commands.items():
                with timed(name), contextlib.redirect_stdout(sys.stderr):
                    codes[name] = command()
            stored = list(cache.entries())
        start = sum(seconds[part] for part in ("rows", "maps", "index"))
        unit = f"s to start with {self.shards} shards"
        line = measure.line("scale", unit, start, "s that a start may take", 5)
        yield {**line, "seconds": seconds, "exit_codes": codes}
        unit, bound = f"MB of memory for the table of {images} images", "MB of its maps alone"
        yield {
            **measure.line("scale", unit, memory / 1e6, bound, maps.nbytes / 1e6),
            "objects": sum(len(entry.objects) for entry in stored),
            "stored_bytes_per_shard": round(sum(e.bytes for e in stored) / self.shards),
        }

    def _fill(self, cache: ScoreCache, folder: Path, spec: ScoreSpec) -> None:
        folder.mkdir()
        table, maps = self._entry(spec)
        records = {}
        for number in progress_bar(range(self.shards), desc="entries", unit="shard"):
            path, shard_id = folder / f"train-{number:06d}.tar", f"{number:032x}"
            path.touch()
            cache.write(shard_id, table, spec, maps[number % len(maps)])
            records[str(path)] = ShardRecord(storage.version(str(path)), shard_id)
        cache.manifests.publish(records)

    def _entry(self, spec: ScoreSpec) -> tuple[ShardTable, list[NDArray[np.float16]]]:
        """A table, and maps that compress as badly as real ones."""
        rows, rng = np.arange(self.images_per_shard), np.random.default_rng(0)
        keys = [f"image-{n:08d}" for n in rows]
        samples = np.stack([110_080 * rows, np.full(len(rows), 109_000), rows], axis=1)
        table = ShardTable(keys, samples, [], 110_080 * len(rows), None)
        shape = (len(rows), spec.grid, spec.grid)
        return table, [(rng.random(shape) + 0.5).astype(np.float16) for _ in range(16)]


def _resident_bytes() -> int:
    """Memory that this process holds now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
