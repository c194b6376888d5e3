"""How fast shards are scored, on one core and by Ray workers."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import ray
import torch
from annotated_types import Ge
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.cluster import start_ray
from famt.jobs.precompute_freq import score_shards
from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache
from famt.pipeline.options import Checked
from famt.pipeline.precompute import ShardReport, score_shard
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.shards import content_id, list_shard


@dataclass(frozen=True)
class Precompute(Checked):
    """Images/s of scoring a shard on one core, beside the rates of only decoding it."""

    shards: list[str] = field(default_factory=list)
    """tars to measure on; the first is used"""
    rounds: Annotated[int, Ge(1)] = 5
    """times that each rival is measured"""
    images: Annotated[int, Ge(1)] = 300
    """images of the shard that are used"""

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
                "Pillow, scaled": partial(_pillow, jpegs, spec.size),
                "DALI, whole": _dali_decoder(shards[:1], len(jpegs)),
            }
            rates = measure.rates(rivals, len(jpegs), self.rounds)
            figure = rates.pop("score")
            for name, bound in rates.items():
                unit = f"images/s, one core, {spec.kind}"
                yield measure.line("precompute", unit, figure, f"decode only, {name}", bound)
            yield _two_workers(data, spec, self.rounds)


def _two_workers(data: bytes, spec: ScoreSpec, rounds: int) -> Report:
    """Rate of two Ray workers over that of one, on eight shards, each scored anew."""
    os.environ["RAY_ADDRESS"] = "local"  # a cluster that is there has other numbers of cores
    start_ray(num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.tar") for number in range(8)]
        for number, path in enumerate(paths):
            path.write_bytes(data + bytes(512 * number))  # other bytes, so another shard

        def score(workers: int) -> None:
            cache = ScoreCache(tempfile.mkdtemp(dir=folder), create=True)
            for _, report in score_shards([*map(str, paths)], cache, spec, workers):
                if not isinstance(report, ShardReport):
                    raise RuntimeError(report)

        rivals = {"one": partial(score, 1), "two": partial(score, 2)}
        rates = measure.rates(rivals, len(paths), rounds)
    ray.shutdown()
    unit, bound = "shards/s of two Ray workers", "of one worker"
    return measure.line("precompute", unit, rates["two"], bound, rates["one"])


def _pillow(jpegs: list[bytes], size: int) -> None:
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            image.draft("RGB", (size, size))
            image.load()


@pipeline_def(num_threads=1, device_id=None, prefetch_queue_depth=1)
def _decode_graph(paths: list[str]) -> DataNode:
    encoded = fn.readers.webdataset(paths=paths, ext=["jpg;jpeg;JPEG;png"])
    return fn.decoders.image(encoded, output_type=types.RGB)


def _dali_decoder(urls: list[str], images: int) -> Callable[[], None]:
    batch_size = math.gcd(images, 50)
    graph = _decode_graph(paths=urls, batch_size=batch_size)
    graph.build()

    def decode() -> None:
        for _ in range(images // batch_size):
            graph.run()

    return decode
