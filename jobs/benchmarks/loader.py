"""What the join costs the loader, and how it compares to what torchvision users have."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

from famt.models import MODELS
from famt.patches import IMAGENET_MEAN, IMAGENET_STD, normalise
from famt.sampling import patch_weights
from jobs.benchmarks import measure
from jobs.benchmarks.measure import Report
from pipeline import storage
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, crop_scores, split_crops
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.scores import ScoreSpec
from pipeline.table import SampleTable, load_maps, load_samples

_READY = 2  # batches that DALI holds ready when a turn begins; they are not counted


@dataclass(frozen=True)
class Loader:
    """Images/s of the loader with join and sampling, beside the bare DALI graph and torchvision."""

    shards: list[str] = field(default_factory=list)
    """tars to measure on"""
    rounds: int = 5
    """times that each rival is measured"""
    images: int = 2000
    """images that each turn covers at least, in whole epochs; few would show how a turn begins"""
    batch_size: int = 64
    """images a batch"""
    threads: int = LoaderConfig.threads
    """DALI's threads, and torchvision's workers"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        spec = ScoreSpec()
        with (
            measure.scored(self.shards, spec) as (urls, cache),
            tempfile.TemporaryDirectory(prefix="famt-folder-") as folder,
        ):
            table = load_samples(urls, cache)
            # Both graphs decode the incomplete last batch of an epoch, which a loader then drops.
            runs = math.ceil(len(table) / self.batch_size)
            epochs = math.ceil((self.images / self.batch_size + _READY) / runs)
            images = (epochs * runs - _READY) * self.batch_size
            _extract(table, cache, Path(folder))
            rates = measure.rates(
                {
                    "joined": self._joined(table, load_maps(table, cache, spec), epochs),
                    "bare": self._bare(table, epochs * runs),
                    "torchvision": self._torchvision(folder, images),
                },
                images,
                self.rounds,
                pause=1.0,
            )
        for name, against in {
            "bare": "bare DALI graph: decode, crop, resize, flip, normalise",
            "torchvision": f"torchvision's ImageFolder and a DataLoader of {self.threads} workers",
        }.items():
            yield measure.line(
                "loader",
                f"images/s with join, sampling and normalisation, {self.threads} threads",
                rates["joined"],
                against,
                rates[name],
            )

    def _joined(self, table: SampleTable, maps: torch.Tensor, epochs: int) -> Callable[[], None]:
        join = JoinConfig()
        loader = CropLoader(table, self._config(), drop_last=True)

        def work() -> None:
            for _ in range(epochs):
                for crops in loader:
                    weights = patch_weights(
                        {"content": crop_scores(maps, crops, 14)}, {"content": 0.25}
                    )
                    batch = split_crops(crops, weights, MODELS["vit_base"], join)
                    normalise(batch.visible)
                    normalise(batch.masked)

        return work

    def _bare(self, table: SampleTable, runs: int) -> Callable[[], None]:
        indices = table.write_indices()
        graph = _crop_graph(
            table.urls,
            [f"{indices.name}/{n}.idx" for n in range(len(table.urls))],
            self._config(),
            batch_size=self.batch_size,
            num_threads=self.threads,
            seed=0,
        )
        graph.build()

        def work() -> None:
            assert indices.name  # the graph reads them as long as it runs
            for _ in range(runs):
                graph.run()

        return work

    def _torchvision(self, folder: str, images: int) -> Callable[[], None]:
        crop = RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
        steps = [crop, RandomHorizontalFlip(), ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        dataset = ImageFolder(folder, Compose(steps))
        loader = DataLoader(
            dataset,
            self.batch_size,
            sampler=RandomSampler(dataset, num_samples=images),  # epoch after epoch, without a gap
            num_workers=self.threads,
            persistent_workers=True,
            multiprocessing_context="spawn",  # DALI's threads do not survive a fork
        )

        def work() -> None:
            for _ in loader:
                pass

        return work

    def _config(self) -> LoaderConfig:
        return LoaderConfig(batch_size=self.batch_size, threads=self.threads)


def _extract(table: SampleTable, cache: ScoreCache, folder: Path) -> None:
    """Write the table's images as files, all in one class."""
    (folder / "all").mkdir()
    for shard_id, url in zip(table.shard_ids, table.urls, strict=True):
        data, kept = storage.read(url), cache.read_table(shard_id)
        for offset, size in zip(kept.offset.tolist(), kept.size.tolist(), strict=True):
            path = folder / "all" / f"{shard_id}-{offset}.jpg"
            path.write_bytes(data[offset : offset + size])


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
