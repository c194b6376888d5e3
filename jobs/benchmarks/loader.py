"""Loader speed: the cost of the join, and torchvision's usual loader beside it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
import webdataset
from annotated_types import Ge
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.models import MODELS
from famt.patches import IMAGENET_MEAN, IMAGENET_STD, normalise
from famt.pipeline.loading.dali_graphs import build_pipeline
from famt.pipeline.loading.dataset import SampleTable, load_maps, load_samples
from famt.pipeline.loading.limits import own_cores
from famt.pipeline.loading.masking import crop_scores, split_crops
from famt.pipeline.loading.resident import crop_loader
from famt.pipeline.options import CACHED_EXPONENT, Checked, JoinConfig, LoaderConfig
from famt.pipeline.scores import ScoreSpec
from famt.sampling import patch_weights

Take = Callable[[], object]  # makes the next batch
_READY = 2  # batches that a loader has ready when its turn begins; not counted


@dataclass(frozen=True)
class Loader(Checked):
    """Crops/s of the loader with join and sampling, against a bare DALI graph and torchvision.

    `crops_per_busy_core` divides by the CPU time of all threads of this process instead.
    """

    shards: list[str] = field(default_factory=list)
    """tars to read"""
    rounds: Annotated[int, Ge(1)] = 5
    """timed turns of each rival"""
    images: Annotated[int, Ge(1)] = 2000
    """crops a turn"""
    batch_size: Annotated[int, Ge(1)] = 64
    """crops a batch"""
    threads: Annotated[int, Ge(1)] = field(default_factory=own_cores)
    """threads of DALI, workers of torchvision"""
    crops: Annotated[tuple[int, ...], Ge(1)] = (2, 4)
    """also time the loader with this many crops per decoded image"""
    resident: bool = False
    """also time the loader that decodes each image once"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """crops and patches are of its size"""
    device: Literal["cpu", "cuda"] = "cpu"
    """decode here; torchvision decodes on CPUs only, and is left out on cuda"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        batches = -(-self.images // self.batch_size)
        with measure.scored(self.shards) as (urls, cache):
            table = load_samples(urls, cache, ScoreSpec())
            maps = load_maps(table, cache, ScoreSpec())
            config = self._config()
            others = {
                f"{crops} crops per decoded image": replace(config, crops_per_image=crops)
                for crops in self.crops
            }
            if self.resident:
                others["each image decoded once"] = replace(config, resident=True)
            bounds = {"bare DALI graph: decode, crop, resize, flip, normalise": self._bare(table)}
            if self.device == "cpu":
                name = f"webdataset and torchvision, DataLoader of {self.threads} workers"
                bounds[name] = self._torchvision(urls)
            takes = {
                name: self._joined(table, maps, each)
                for name, each in {"joined": config, **others}.items()
            } | bounds
            busy: dict[str, list[float]] = {name: [] for name in takes}
            rivals = {
                name: partial(_turn, take, batches + _READY, busy[name])
                for name, take in takes.items()
            }
            seconds = measure.seconds(rivals, self.rounds, pause=1.0)
        crops = batches * self.batch_size
        rates = {name: crops / statistics.median(each) for name, each in seconds.items()}
        unit = (
            f"crops/s with join, sampling and normalisation, {self.device}, {self.threads} threads"
        )
        lines = [("joined", unit, bound, bound) for bound in bounds]
        lines += [(name, f"{unit}, {name}", "joined", "one crop a decode") for name in others]
        for name, what, bound, against in lines:
            # Skip the warm-up. Other work on the machine only ever adds to a round: take the least.
            core = (crops + _READY * self.batch_size) / min(busy[name][1:])
            line = measure.line("loader", what, rates[name], against, rates[bound])
            yield {**line, "crops_per_busy_core": round(core, 1)}

    def _joined(self, table: SampleTable, maps: torch.Tensor, config: LoaderConfig) -> Take:
        loader = crop_loader(table, config, drop_last=True, device=self.device)
        crops = itertools.chain.from_iterable(itertools.repeat(loader))
        sizes = MODELS[self.model]

        def take() -> None:
            batch = next(crops)
            scores = {"frequency": crop_scores(maps, batch, sizes.grid)}
            weights = patch_weights(scores, {"frequency": CACHED_EXPONENT})
            patches = split_crops(batch, weights, sizes, JoinConfig())
            normalise(patches.visible)
            normalise(patches.masked)

        return take

    def _bare(self, table: SampleTable) -> Take:
        run: Take = build_pipeline(
            _crop_graph,
            table,
            range(len(table)),
            self._config(),
            torch.device(self.device),
            batch_size=self.batch_size,
            seed=0,
        ).run
        return run

    def _torchvision(self, urls: list[str]) -> Take:
        crop = transforms.RandomResizedCrop(
            MODELS[self.model].image_size,
            scale=(0.2, 1.0),
            interpolation=InterpolationMode.BICUBIC,
        )
        last = transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *last])
        samples = webdataset.WebDataset(urls, resampled=True, shardshuffle=False, empty_check=False)
        samples = samples.shuffle(1000).decode("pilrgb").to_tuple("jpg;jpeg;png;webp")
        samples = samples.map_tuple(augment)
        loader: DataLoader[torch.Tensor] = DataLoader(
            samples,
            self.batch_size,
            num_workers=self.threads,
            multiprocessing_context="spawn",  # a fork loses DALI's threads
        )
        return partial(next, iter(loader))

    def _config(self) -> LoaderConfig:
        return LoaderConfig(
            image_size=MODELS[self.model].image_size,
            batch_size=self.batch_size,
            threads=self.threads,
        )


def _turn(take: Take, batches: int, busy: list[float]) -> None:
    """Make batches; append the CPU seconds of all threads of this process to `busy`."""
    before = time.process_time()
    for _ in range(batches):
        take()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    busy.append(time.process_time() - before)


@pipeline_def
def _crop_graph(
    paths: list[str], index_paths: list[str], config: LoaderConfig, on_gpu: bool
) -> DataNode:
    encoded = fn.readers.webdataset(
        paths=paths, index_paths=index_paths, ext=["jpg"], dont_use_mmap=True,
        random_shuffle=True, initial_fill=config.shuffle_buffer,
    )  # fmt: skip
    resize = partial(
        fn.resize, size=[config.image_size] * 2, interp_type=types.INTERP_CUBIC, antialias=True
    )
    if on_gpu:  # like the loader: decode whole, crop within the resize
        extent = fn.peek_image_shape(encoded)[:2]
        anchor, shape = fn.random_crop_generator(extent, random_area=[0.2, 1.0])
        start, end = (fn.cast(each, dtype=types.FLOAT) for each in (anchor, anchor + shape))
        whole = fn.decoders.image(encoded, device="mixed", output_type=types.RGB)
        images = resize(whole, roi_start=start, roi_end=end)
    else:
        region = {"random_area": [0.2, 1.0], "output_type": types.RGB}
        images = resize(fn.decoders.image_random_crop(encoded, **region))
    mean, std = ([255 * each for each in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return fn.crop_mirror_normalize(
        images, mirror=fn.random.coin_flip(), mean=mean, std=std, dtype=types.FLOAT
    )
