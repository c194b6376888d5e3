"""What the join costs the loader, and how it compares to what torchvision users have."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge
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

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.models import MODELS
from famt.patches import IMAGENET_MEAN, IMAGENET_STD, normalise
from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache
from famt.pipeline.join import crop_scores, split_crops
from famt.pipeline.loader import CropLoader, own_cores
from famt.pipeline.options import Checked, JoinConfig, LoaderConfig
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.table import SampleTable, load_maps, load_samples
from famt.sampling import patch_weights

_READY = 2  # batches that DALI holds ready when a turn begins; they are not counted


@dataclass(frozen=True)
class Loader(Checked):
    """Images/s of the loader with join and sampling, beside the bare DALI graph and torchvision."""

    shards: list[str] = field(default_factory=list)
    """tars to measure on"""
    rounds: Annotated[int, Ge(1)] = 5
    """times that each rival is measured"""
    images: Annotated[int, Ge(1)] = 2000
    """images that each turn covers at least, in whole epochs; few would show how a turn begins"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images a batch"""
    threads: Annotated[int, Ge(1)] = field(default_factory=own_cores)
    """DALI's threads, and torchvision's workers"""
    crops: Annotated[tuple[int, ...], Ge(1)] = (2, 4)
    """crops of each decoded image, a rival each beside one of one"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where crops are decoded; torchvision, which decodes on CPUs, is no rival on cuda"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        spec = ScoreSpec()
        with (
            measure.scored(self.shards, spec) as (urls, cache),
            tempfile.TemporaryDirectory(prefix="famt-folder-") as folder,
        ):
            table = load_samples(urls, cache)
            maps = load_maps(table, cache, spec)
            _extract(table, cache, Path(folder))
            counts = {crops: self._epochs(len(table), crops) for crops in (1, *self.crops)}
            epochs, crops = counts[1]
            rivals = {
                "joined": self._joined(table, maps, 1, epochs),
                "bare": self._bare(table, epochs * self._runs(len(table), 1)),
            }
            if self.device == "cpu":
                rivals["torchvision"] = self._torchvision(folder, crops)
            several = {f"{k} crops": self._joined(table, maps, k, counts[k][0]) for k in self.crops}
            busy: dict[str, list[float]] = {name: [] for name in ("joined", *several)}
            timed = {
                name: partial(_count_cpu, work, busy[name]) if name in busy else work
                for name, work in {**rivals, **several}.items()
            }
            taken = measure.seconds(timed, self.rounds, pause=1.0)
        covered = dict.fromkeys(rivals, crops) | {f"{k} crops": counts[k][1] for k in self.crops}
        rates = {name: covered[name] / statistics.median(each) for name, each in taken.items()}
        # The first round does not count; what else the machine does only adds to a round.
        core = {name: covered[name] / min(each[1:]) for name, each in busy.items()}
        size = sum(storage.version(url).size for url in urls) / len(table)
        unit = (
            f"crops/s with join, sampling and normalisation, {self.device}, {self.threads} threads"
        )
        bounds = {
            "bare": "bare DALI graph: decode, crop, resize, flip, normalise",
            "torchvision": f"torchvision's ImageFolder and a DataLoader of {self.threads} workers",
        }
        for name, against in bounds.items():
            if name not in rates:
                continue
            line = measure.line("loader", unit, rates["joined"], against, rates[name])
            yield {**line, **_per_core(core["joined"], size, 1)}
        for name in several:
            against = "one crop of each decoded image"
            line = measure.line("loader", f"{unit}, {name}", rates[name], against, rates["joined"])
            yield {**line, **_per_core(core[name], size, int(name.split()[0]))}

    def _runs(self, images: int, crops: int) -> int:
        """Batches of an epoch: graphs decode the incomplete last one, which a loader then drops."""
        return math.ceil(images * crops / self.batch_size)

    def _epochs(self, images: int, crops: int) -> tuple[int, int]:
        """Epochs of a turn, and the crops that it counts."""
        runs = self._runs(images, crops)
        epochs = math.ceil((self.images / self.batch_size + _READY) / runs)
        return epochs, (epochs * runs - _READY) * self.batch_size

    def _joined(
        self, table: SampleTable, maps: torch.Tensor, crops_per_image: int, epochs: int
    ) -> Callable[[], None]:
        join = JoinConfig()
        config = dataclasses.replace(self._config(), crops_per_image=crops_per_image)
        loader = CropLoader(table, config, drop_last=True, device=self.device)

        def work() -> None:
            for _ in range(epochs):
                for crops in loader:
                    weights = patch_weights(
                        {"frequency": crop_scores(maps, crops, 14)}, {"frequency": 0.25}
                    )
                    batch = split_crops(crops, weights, MODELS["vit_base"], join)
                    normalise(batch.visible)
                    normalise(batch.masked)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return work

    def _bare(self, table: SampleTable, runs: int) -> Callable[[], None]:
        with tempfile.TemporaryDirectory(prefix="famt-index-") as folder:
            shards = table.write_indices(Path(folder), range(len(table)))
            graph = _crop_graph(
                [table.urls[shard] for shard in shards],
                [f"{folder}/{shard}.idx" for shard in shards],
                self._config(),
                batch_size=self.batch_size,
                num_threads=self.threads,
                seed=0,
                device_id=0 if self.device == "cuda" else None,
                on_gpu=self.device == "cuda",
            )
            graph.build()

        def work() -> None:
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


def _count_cpu(work: Callable[[], None], busy: list[float]) -> None:
    """Work, and note the seconds that all threads of this process were busy with it."""
    before = time.process_time()
    work()
    busy.append(time.process_time() - before)


def _per_core(rate: float, image_bytes: float, crops: int) -> Report:
    """What a busy core gives, and has to be fed: crops/s, and MB/s of tars."""
    return {
        "crops_per_busy_core": round(rate, 1),
        "kb_an_image": round(image_bytes / 1e3, 1),
        "mb_read_per_busy_core": round(rate / crops * image_bytes / 1e6, 1),
    }


def _extract(table: SampleTable, cache: ScoreCache, folder: Path) -> None:
    """Write the table's images as files, all in one class."""
    (folder / "all").mkdir()
    for shard_id, url in zip(table.shard_ids, table.urls, strict=True):
        data, kept = storage.read(url), cache.read_table(shard_id)
        for offset, size in zip(kept.offset.tolist(), kept.size.tolist(), strict=True):
            path = folder / "all" / f"{shard_id}-{offset}.jpg"
            path.write_bytes(data[offset : offset + size])


@pipeline_def
def _crop_graph(
    paths: list[str], index_paths: list[str], config: LoaderConfig, on_gpu: bool
) -> DataNode:
    encoded = fn.readers.webdataset(
        paths=paths,
        index_paths=index_paths,
        ext=["jpg"],
        random_shuffle=True,
        initial_fill=config.shuffle_buffer,
        dont_use_mmap=True,
    )
    resize = partial(
        fn.resize, size=[config.image_size] * 2, interp_type=types.INTERP_CUBIC, antialias=True
    )
    if on_gpu:  # as the loader: whole, and cut while it is resized
        extent = fn.peek_image_shape(encoded)[:2]
        anchor, shape = fn.random_crop_generator(extent, random_area=[0.2, 1.0])
        start, end = (fn.cast(each, dtype=types.FLOAT) for each in (anchor, anchor + shape))
        whole = fn.decoders.image(encoded, device="mixed", output_type=types.RGB)
        images = resize(whole, roi_start=start, roi_end=end)
    else:
        region = {"random_area": [0.2, 1.0], "output_type": types.RGB}
        images = resize(fn.decoders.image_random_crop(encoded, **region))
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(),
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        dtype=types.FLOAT,
    )
