"""Scoring speed on one core, and with one and two Ray workers."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from PIL import Image

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.options import Checked
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import ShardReport, score_shard
from famt.pipeline.sharding.shards import content_id, list_shard


@dataclass(frozen=True)
class Precompute(Checked):
    """Scoring: images/s on one core against decoding alone; two Ray workers against one."""

    shards: list[str] = field(default_factory=list)
    """tars, of which the first is used"""
    rounds: Annotated[int, Ge(1)] = 5
    """timed turns of each rival"""
    images: Annotated[int, Ge(1)] = 300
    """images of the shard to use"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        spec = ScoreSpec()
        with measure.shards(self.shards) as shards:
            data = storage.read(shards[0])
            samples = list_shard(data).samples[: self.images]
            data = data[: samples[-1].offset + samples[-1].size] + bytes(1024)
            jpegs = [data[s.offset : s.offset + s.size] for s in samples]
            rivals: dict[str, Callable[[], object]] = {
                "score": lambda: (content_id(data), score_shard(data, spec)),
                "decode": partial(_decode, jpegs, spec.size),
            }
            rates = measure.rates(rivals, len(jpegs), self.rounds)
        unit = f"images/s, one core, {spec.kind}"
        bound = "decode alone: Pillow, scaled"
        yield measure.line("precompute", unit, rates["score"], bound, rates["decode"])
        yield _two_workers(data, spec, self.rounds)


def _two_workers(data: bytes, spec: ScoreSpec, rounds: int) -> Report:
    """Shards/s of two Ray workers against one, eight shards a turn into an empty cache."""
    import ray  # here, since other benchmarks run without

    from famt.jobs.cluster import start_ray
    from famt.jobs.precompute_freq import score_shards

    os.environ["RAY_ADDRESS"] = "local"  # a running cluster has another number of cores
    start_ray(num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.tar") for number in range(8)]
        for number, path in enumerate(paths):
            path.write_bytes(data + bytes(512 * number))  # other bytes, hence another shard

        def score(workers: int) -> None:
            cache = ScoreCache(tempfile.mkdtemp(dir=folder), create=True)
            for _, report in score_shards([*map(str, paths)], cache, spec, workers):
                if not isinstance(report, ShardReport):
                    raise RuntimeError(report)

        rivals = {"one": partial(score, 1), "two": partial(score, 2)}
        rates = measure.rates(rivals, len(paths), rounds)
    ray.shutdown()
    unit, bound = "shards/s of two Ray workers", "one worker"
    return measure.line("precompute", unit, rates["two"], bound, rates["one"])


def _decode(jpegs: list[bytes], size: int) -> None:
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            image.draft("RGB", (size, size))
            image.load()
