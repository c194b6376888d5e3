"""How fast images are scored, and what the scaled decoding costs in agreement."""

from __future__ import annotations

import io
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
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
from famt.pipeline.decode import decode
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
        spec, former = ScoreSpec(), ScoreSpec("border_geodesic")
        with measure.shards(self.shards) as shards:
            data = storage.read(shards[0])
            samples = list_shard(data).samples[: self.images]
            data = data[: samples[-1].offset + samples[-1].size] + bytes(1024)
            jpegs = [data[s.offset : s.offset + s.size] for s in samples]
            rates = measure.rates(
                {
                    "score": lambda: (content_id(data), score_shard(data, spec)),
                    former.kind: lambda: (content_id(data), score_shard(data, former)),
                    "pillow_draft": partial(_pillow, jpegs, spec.size),
                    "pillow_full": partial(_pillow, jpegs, None),
                    "dali": _dali_decoder(shards[:1], len(jpegs)),
                },
                len(jpegs),
                self.rounds,
            )
            figure = rates.pop("score")
            unit = f"images/s, one core, {spec.kind}"
            for name, bound in rates.items():
                against = name if name == former.kind else f"decode only, {name}"
                yield measure.line("precompute", unit, figure, against, bound)
            yield _agreement(jpegs, spec)
            yield _two_workers(data, spec, self.rounds)


def _agreement(jpegs: list[bytes], spec: ScoreSpec) -> Report:
    """Scores of DCT-scaled decodes against those of full decodes."""
    full = []
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            whole = image.convert("RGB").resize((spec.size,) * 2, Image.Resampling.BOX)
            full.append(np.array(whole))
    scaled = [decode(jpeg, spec.size) for jpeg in jpegs]
    a, b = (spec.score(torch.from_numpy(np.stack(each))).flatten(1) for each in (scaled, full))
    correlations = measure.rank_correlations(a, b)
    return {
        **measure.line(
            "precompute",
            "rank correlation of scores from scaled and full decodes, mean over photos",
            statistics.mean(correlations),
            "perfect agreement",
            1.0,
        ),
        "worst_photo": round(min(correlations), 4),
        "mean_absolute_error": round(float((a - b).abs().mean()), 4),
    }


def _two_workers(data: bytes, spec: ScoreSpec, rounds: int) -> Report:
    """Rate of two Ray workers over that of one, on eight copies of a shard, each scored anew."""
    os.environ["RAY_ADDRESS"] = "local"  # a cluster that is there has other numbers of cores
    start_ray(num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        urls = []
        for number in range(8):
            path = Path(folder) / f"{number}.tar"
            path.write_bytes(data + bytes(512 * number))  # other bytes, so another entry
            urls.append(str(path))
        turn = itertools.count()

        def score(workers: int) -> None:
            cache = ScoreCache(f"{folder}/cache-{next(turn)}", create=True)
            for _, report in score_shards(urls, cache, spec, workers):
                if not isinstance(report, ShardReport):
                    raise RuntimeError(report)

        rates = measure.rates(
            {"one": partial(score, 1), "two": partial(score, 2)}, len(urls), rounds
        )
    ray.shutdown()
    return measure.line(
        "precompute", "shards/s of two Ray workers", rates["two"], "of one worker", rates["one"]
    )


def _pillow(jpegs: list[bytes], size: int | None) -> None:
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            if size is not None:
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
