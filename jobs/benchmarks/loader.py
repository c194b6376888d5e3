"""What the join costs the loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from famt.patches import normalise
from jobs.benchmarks import measure
from jobs.benchmarks.measure import Report
from pipeline.join import JoinConfig, join_weights, split_crops
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.scores import ScoreSpec
from pipeline.table import load_table


@dataclass(frozen=True)
class Loader:
    """Images/s of the loader with join and sampling, beside the bare DALI graph."""

    shards: list[str] = field(default_factory=list)
    """tars to measure on"""
    rounds: int = 5
    """epochs that each rival is measured for"""
    batch_size: int = 64
    """images a batch"""
    threads: int = LoaderConfig.threads
    """DALI's threads"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        spec, join = ScoreSpec(), JoinConfig()
        with measure.scored(self.shards, spec) as (urls, cache):
            table = load_table(urls, cache, spec)
            config = LoaderConfig(batch_size=self.batch_size, threads=self.threads)
            loader = CropLoader(table, config, drop_last=True)
            indices = table.write_indices()
            bare = _crop_graph(
                table.urls,
                [f"{indices.name}/{n}.idx" for n in range(len(table.urls))],
                config,
                batch_size=config.batch_size,
                num_threads=config.threads,
                seed=0,
            )
            bare.build()

            def joined() -> None:
                for crops in loader:
                    weights = join_weights(crops, table, 14, join)
                    batch = split_crops(crops, table, weights, 16, join)
                    normalise(batch.visible)
                    normalise(batch.masked)

            def plain() -> None:
                for _ in range(runs):
                    bare.run()

            # Both decode the incomplete last batch of an epoch, which a loader then drops.
            runs = math.ceil(len(table) / self.batch_size)
            images = runs * self.batch_size
            rates = measure.rates({"joined": joined, "bare": plain}, images, self.rounds)
        yield measure.line(
            "loader",
            f"images/s with join, sampling and normalisation, {self.threads} threads",
            rates["joined"],
            "bare DALI graph: decode, crop, resize, flip, normalise",
            rates["bare"],
        )


@pipeline_def(device_id=None)
def _crop_graph(paths: list[str], index_paths: list[str], config: LoaderConfig) -> DataNode:
    encoded = fn.readers.webdataset(
        paths=paths,
        index_paths=index_paths,
        ext=["jpg"],
        random_shuffle=True,
        initial_fill=config.shuffle_buffer,
        dont_use_mmap=True,
    )
    images = fn.decoders.image_random_crop(encoded, random_area=[0.2, 1.0], output_type=types.RGB)
    images = fn.resize(
        images, size=[config.image_size] * 2, interp_type=types.INTERP_CUBIC, antialias=True
    )
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(),
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        dtype=types.FLOAT,
    )
