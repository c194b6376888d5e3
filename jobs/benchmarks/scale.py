"""What many shards cost at start."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from torch import Tensor
from tqdm import tqdm

from famt.jobs import cache as cache_command
from famt.jobs import precompute_freq
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.options import PrecomputeFreq
from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache, ShardTable
from famt.pipeline.dataset import SampleTable, load_maps, load_samples
from famt.pipeline.manifest import ShardRecord
from famt.pipeline.options import Checked
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.shards import write_dali_index

_TARS, _ROWS = 128, 8192  # whose index DALI reads


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
            table, maps = self._entry(spec)
            Path(folder, "shards").mkdir()
            records, seconds = {}, {}
            started = time.perf_counter()
            for number in tqdm(range(self.shards), desc="entries", unit="shard"):
                path = Path(folder, "shards", f"train-{number:06d}.tar")
                path.touch()
                shard_id = f"{number:032x}"
                cache.write(shard_id, table, spec, maps[number % len(maps)])
                records[str(path)] = ShardRecord(storage.version(str(path)), shard_id)
            seconds["write"] = time.perf_counter() - started
            cache.manifests.publish(records)
            before = measure.resident_bytes()
            start = _start(f"{folder}/shards", cache, spec)
            memory = measure.resident_bytes() - before
            commands = {
                "precompute_with_nothing_to_do": lambda: precompute_freq.main(
                    PrecomputeFreq([f"{folder}/shards"], cache.url)
                ),
                "ls": lambda: cache_command.main(cache_command.Ls(cache.url)),
                "gc": lambda: cache_command.main(cache_command.Gc(cache.url, days=0)),
            }
            codes = {}
            for name, command in commands.items():
                started = time.perf_counter()
                with contextlib.redirect_stdout(sys.stderr):
                    codes[name] = command()
                seconds[name] = time.perf_counter() - started
            stored = list(cache.entries())
            images = self.shards * self.images_per_shard
            yield {
                **measure.line(
                    "scale",
                    f"s to start with {self.shards} shards",
                    start.total,
                    "s that a start may take",
                    5,
                ),
                "seconds": _rounded(start.seconds),
                **_rounded(seconds),
                "exit_codes": codes,
            }
            yield {
                **measure.line(
                    "scale",
                    f"MB of memory that the table of {images} images takes",
                    memory / 1e6,
                    "MB of its score maps alone",
                    start.maps.nbytes / 1e6,
                ),
                "objects": sum(len(entry.objects) for entry in stored),
                "stored_bytes_per_shard": round(sum(e.bytes for e in stored) / self.shards),
            }
            held, parsed = _index_bytes(Path(folder))
            line = measure.line(
                "scale",
                f"bytes a row of the {_TARS * _ROWS} that a rank reads, for DALI's index",
                held / (_TARS * _ROWS),
                "its structures alone: 64 a sample, 104 a component, 8 an output",
                176,
            )
            yield {**line, "seconds_to_parse_it": round(parsed, 2)}

    def _entry(self, spec: ScoreSpec) -> tuple[ShardTable, list[NDArray[np.float16]]]:
        """A table, and some maps that are as good as incompressible, as real ones are."""
        rows, rng = np.arange(self.images_per_shard), np.random.default_rng(0)
        keys = [f"image-{n:08d}" for n in rows]
        sizes, length = np.full(len(rows), 109_000), 110_080 * len(rows)
        table = ShardTable(keys, 110_080 * rows, sizes, rows, [], length, None)
        shape = (len(rows), spec.grid, spec.grid)
        return table, [(rng.random(shape) + 0.5).astype(np.float16) for _ in range(16)]


@dataclass(frozen=True)
class _Started:
    """What a run has in memory when it starts, and how long each part of that took."""

    samples: SampleTable
    maps: Tensor
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def _start(shards: str, cache: ScoreCache, spec: ScoreSpec) -> _Started:
    """All that the start of a run does with a cache, as `famt.train.pretrain` does it."""
    times = [time.perf_counter()]
    samples = load_samples([shards], cache, spec)
    times.append(time.perf_counter())
    maps = load_maps(samples, cache, spec)
    times.append(time.perf_counter())
    with tempfile.TemporaryDirectory(prefix="famt-index-") as folder:
        samples.write_indices(Path(folder), range(len(samples)))
        times.append(time.perf_counter())
    parts = ("rows", "maps", "index")
    taken = (after - before for before, after in itertools.pairwise(times))
    return _Started(samples, maps, dict(zip(parts, taken, strict=True)))


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(each, 2) for name, each in seconds.items()}


def _index_bytes(folder: Path) -> tuple[int, float]:
    """Memory that DALI's reader takes for the index of so many tars, and seconds to parse it."""
    tars = [folder / f"{number}.tar" for number in range(_TARS)]
    for number, tar in enumerate(tars):
        tar.touch()
        samples = ((number * _ROWS + row, row * 110_080, 109_000) for row in range(_ROWS))
        write_dali_index(tar.with_suffix(".idx"), samples)
    graphs = []
    for some in (tars[:1], tars):  # the first to load DALI itself
        before, started = measure.resident_bytes(), time.perf_counter()
        indices = [str(tar.with_suffix(".idx")) for tar in some]
        graph = _reader(paths=[*map(str, some)], index_paths=indices, batch_size=1, num_threads=1)
        graph.build()
        graphs.append(graph)
    return measure.resident_bytes() - before, time.perf_counter() - started


@pipeline_def
def _reader(paths: list[str], index_paths: list[str]) -> DataNode:
    return fn.readers.webdataset(
        paths=paths, index_paths=index_paths, ext=["jpg"], dont_use_mmap=True
    )
