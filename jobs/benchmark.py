"""Measure what the project promises, each figure beside the bound it is held against.

    python -m jobs.benchmark precompute --shards 'shards/train-*.tar'
    python -m jobs.benchmark loader --shards 'shards/train-*.tar'
    python -m jobs.benchmark step --model vit_base
    python -m jobs.benchmark quality --photos human-seg/images --masks human-seg/masks
    python -m jobs.benchmark scale --shards 20000

Prints JSON lines: the figure, the bound from the same run, and their ratio. Rivals are measured in
turn, round after round, and compared by their medians: a machine's mood hits them alike. Without
`--shards`, photos of ImageNet's usual size are made up.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import ray
import torch
import tyro
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from famt.frequency import PIXEL_KINDS, pixel_frequency
from famt.mae import MODELS, Decoder, MaskedAutoencoder
from famt.patches import normalise
from famt.sampling import sample_patches
from jobs import precompute_freq
from jobs.precompute_freq import score_shards
from pipeline import storage
from pipeline.cache import ScoreCache, ShardTable
from pipeline.join import JoinConfig, join_weights, split_crops
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.manifest import ShardRecord
from pipeline.precompute import ShardReport, decode, precompute_shard, score_shard
from pipeline.scores import ScoreSpec
from pipeline.shards import content_id, list_shard
from pipeline.table import load_table
from pipeline.writer import Encoding, Item, write_shards
from train.program import run_program

Report = dict[str, object]


@dataclass(frozen=True)
class Precompute:
    """Images/s of scoring a shard on one core, beside the rates of only decoding it."""

    shards: list[str] = field(default_factory=list)
    """tars to measure on; the first is used"""
    rounds: int = 5
    """times that each rival is measured"""
    images: int = 300
    """images of the shard that are used"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(1)
        spec = ScoreSpec()
        with _shards(self.shards) as shards:
            data = storage.read(shards[0])
            samples = list_shard(data).samples[: self.images]
            data = data[: samples[-1].offset + samples[-1].size] + bytes(1024)
            jpegs = [data[s.offset : s.offset + s.size] for s in samples]
            rates = _rates(
                {
                    "score": lambda: (content_id(data), score_shard(data, spec)),
                    "pillow_draft": partial(_pillow, jpegs, spec.size),
                    "pillow_full": partial(_pillow, jpegs, None),
                    "dali": _dali_decoder(shards[:1], len(jpegs)),
                },
                len(jpegs),
                self.rounds,
            )
            figure = rates.pop("score")
            for name, bound in rates.items():
                against = f"decode only, {name}"
                yield _line("precompute", "images/s, one core", figure, against, bound)
            yield _agreement(jpegs, spec)
            yield _two_workers(data, spec, self.rounds)


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
        with _shards(self.shards) as shards, tempfile.TemporaryDirectory() as folder:
            cache = ScoreCache(folder, create=True)
            for url in tqdm(storage.expand(shards), desc="scoring", unit="shard"):
                report = precompute_shard(url, cache, spec)
                cache.manifests.publish({url: ShardRecord(report.version, report.shard_id)})
            table = load_table(shards, cache, spec)
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
            rates = _rates({"joined": joined, "bare": plain}, images, self.rounds)
        yield _line(
            "loader",
            f"images/s with join, sampling and normalisation, {self.threads} threads",
            rates["joined"],
            "bare DALI graph: decode, crop, resize, flip, normalise",
            rates["bare"],
        )


@dataclass(frozen=True)
class Step:
    """Time and peak memory of FAMT's training steps, beside this code's own plain MAE step.

    `famt self` and `famt cross` mask 45 % and throw 40 %, under either decoder; `mae self` masks
    75 %. The time is a whole step: forward, backward and AdamW. A disturbed run shows in the
    fastest steps' ratio (`ratio_of_fastest`), which then differs from the medians'.
    """

    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    batch_size: int = 16
    """images a step"""
    rounds: int = 5
    """steps that each rival is measured for"""
    threads: int = 2
    """CPU threads"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """what to compute on"""

    def run(self) -> Iterator[Report]:
        # A process each, and before this one holds a model: what one rival frees helps no other.
        memory = {name: self._memory(name) for name in tqdm(_RIVALS, desc="memory")}
        torch.set_num_threads(self.threads)
        rivals = {name: _Rival(name, self) for name in _RIVALS}
        flops = {name: rival.flops() for name, rival in rivals.items()}
        seconds = _seconds({name: rival.step for name, rival in rivals.items()}, self.rounds)
        median = {name: statistics.median(each) for name, each in seconds.items()}
        bound = "mae self"
        famt = [name for name in _RIVALS if name != bound]
        setting = (
            f"{self.model}, {self.precision}, {self.device}, batch {self.batch_size}, "
            f"{self.threads} threads"
        )
        for name in famt:
            yield {
                **_line(
                    "step",
                    f"ms an image of a step of {name}, {setting}",
                    1000 * median[name] / self.batch_size,
                    f"ms an image of a step of {bound}",
                    1000 * median[bound] / self.batch_size,
                ),
                "ratio_of_fastest": round(min(seconds[name]) / min(seconds[bound]), 3),
                "flop_ratio": round(flops[name] / flops[bound], 3),
                "gflop": {n: round(flops[n] / self.batch_size / 1e9, 2) for n in (name, bound)},
                "gflop_per_second": {
                    n: round(flops[n] / median[n] / 1e9, 1) for n in (name, bound)
                },
            }
        for name in famt:
            yield {
                **_line(
                    "step",
                    "MB that a step adds at its peak to weights, gradients and optimiser, "
                    f"{name}, {setting}",
                    memory[name].added / 1e6,
                    f"MB of {bound}",
                    memory[bound].added / 1e6,
                ),
                "whole_mb": {n: round(memory[n].whole / 1e6) for n in (name, bound)},
                "whole_ratio": round(memory[name].whole / memory[bound].whole, 3),
            }

    def _memory(self, name: str) -> _Memory:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh_process:
            return fresh_process.submit(_step_memory, name, self).result()


# Decoder, mask ratio, throw ratio.
_RIVALS: dict[str, tuple[Decoder, float, float]] = {
    "famt self": ("self", 0.45, 0.40),
    "famt cross": ("cross", 0.45, 0.40),
    "mae self": ("self", 0.75, 0.0),
}


class _Rival:
    """A model, its optimiser and a batch of made-up patches."""

    def __init__(self, name: str, options: Step) -> None:
        decoder, mask, throw = _RIVALS[name]
        sizes, device = MODELS[options.model], torch.device(options.device)
        self._autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=options.precision == "bf16"
        )
        self._model = MaskedAutoencoder(sizes, decoder).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), 1e-4, fused=True)
        weights = torch.ones(options.batch_size, sizes.grid**2, device=device)
        split = sample_patches(weights, mask, throw)
        values = sizes.patch_size**2 * 3
        visible = torch.randn(*split.visible.shape, values, device=device)
        masked = torch.randn(*split.masked.shape, values, device=device)
        self._batch = visible, masked, split

    def accumulate(self) -> None:
        """Add a batch's gradients to those that are there."""
        with self._autocast():
            loss = self._model(*self._batch)
        loss.backward()

    def step(self) -> None:
        """A training step, waited for."""
        self.accumulate()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def flops(self) -> int:
        """Of the matrix products and attentions of a forward and a backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.accumulate()
        self._optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


@dataclass(frozen=True)
class _Memory:
    """Peaks in bytes. On a CPU `whole` is the process's, its libraries included; on a GPU it is
    what torch allocated there."""

    whole: int
    """in a training step"""
    added: int
    """by forward and backward, to what is held where gradients lie ready to be added to"""


def _step_memory(name: str, options: Step) -> _Memory:
    """Runs in a process of its own."""
    # glibc then maps each tensor by itself, so that memory which is freed counts no more.
    map_from_bytes = -3  # M_MMAP_THRESHOLD of <malloc.h>
    ctypes.CDLL(None).mallopt(map_from_bytes, 1 << 16)
    torch.set_num_threads(options.threads)
    rival = _Rival(name, options)
    peak = _peak_of_cuda if options.device == "cuda" else _peak_of_process
    rival.step()  # allocates the optimiser's moments
    whole, _ = peak(rival.step)
    rival.accumulate()
    during, before = peak(rival.accumulate)
    return _Memory(whole, during - before)


def _peak_of_cuda(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes allocated on the GPU: most while working, and before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated(), before


def _peak_of_process(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes resident in this process: most while working, and before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident_bytes()
    work()
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024, before


@dataclass(frozen=True)
class Quality:
    """How well each kind of map tells objects from background, without any learning.

    Area under the ROC curve of a 14 x 14 map against object masks, mean over photos. Beside each
    figure: the same maps laid on other photos' masks (`elsewhere`), which shows how much of it is
    just where photographers put their objects, and a centred Gaussian that looks at no image.
    """

    photos: Path
    """folder of photos"""
    masks: Path
    """folder of masks of the same names: white where the object is"""
    grid: int = 14
    """cells a side"""

    def run(self) -> Iterator[Report]:
        spec = ScoreSpec(grid=self.grid)
        images, truths = [], []
        masks = {path.stem: path for path in self.masks.iterdir()}
        for photo in tqdm(sorted(self.photos.iterdir()), desc="photos"):
            truth = _object_cells(masks[photo.stem], self.grid)
            if truth.any() and not truth.all():
                size = (spec.size, spec.size)
                with Image.open(photo) as image:
                    squashed = image.convert("RGB").resize(size, Image.Resampling.BOX)
                images.append(torch.from_numpy(np.array(squashed)))
                truths.append(truth)
        pixels = torch.stack(images).permute(0, 3, 1, 2) / 255
        axis = torch.linspace(-1, 1, self.grid)
        gaussian = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 0.5**2)).expand(
            len(pixels), -1, -1
        )
        baseline = _auc(gaussian, truths)
        for kind in PIXEL_KINDS:
            maps = pixel_frequency(pixels, self.grid, kind)
            yield {
                **_line(
                    "quality", f"AUC of {kind}", _auc(maps, truths), "centred Gaussian", baseline
                ),
                "elsewhere": round(_auc(maps.roll(len(maps) // 3, 0), truths), 4),
                "photos": len(maps),
            }


@dataclass(frozen=True)
class Scale:
    """What many shards cost at start: time and memory to resolve and load a large made-up cache."""

    shards: int = 20_000
    """shards of the made-up data set, each its own entry"""
    images_per_shard: int = 20
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
            before = _resident_bytes()
            started = time.perf_counter()
            loaded = load_table([f"{folder}/shards"], cache, spec)
            seconds["load"] = time.perf_counter() - started
            memory = _resident_bytes() - before
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
            assert loaded.maps is not None
            yield {
                **_line(
                    "scale",
                    f"MB of memory that the table of {images} images takes",
                    memory / 1e6,
                    "MB of its score maps alone",
                    loaded.maps.nbytes / 1e6,
                ),
                "shards": self.shards,
                "seconds": {name: round(each, 2) for name, each in seconds.items()},
                "second_precompute_exit_code": done,
                "objects": sum(entry.objects for entry in entries),
                "stored_bytes_per_shard": round(sum(e.bytes for e in entries) / self.shards),
            }


Benchmark = (
    Annotated[Precompute, tyro.conf.subcommand("precompute")]
    | Annotated[Loader, tyro.conf.subcommand("loader")]
    | Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[Quality, tyro.conf.subcommand("quality")]
    | Annotated[Scale, tyro.conf.subcommand("scale")]
)


def main(benchmark: Benchmark) -> None:
    """Print the benchmark's lines as they come."""
    for line in benchmark.run():
        print(json.dumps(line), flush=True)


def _line(name: str, unit: str, figure: float, against: str, bound: float) -> Report:
    return {
        "benchmark": name,
        "figure": round(figure, 4),
        "unit": unit,
        "bound": round(bound, 4),
        "against": against,
        "ratio": round(figure / bound, 3),
    }


def _rates(rivals: dict[str, Callable[[], object]], images: int, rounds: int) -> dict[str, float]:
    """Median images/s of each rival, taking turns, after a round that does not count."""
    seconds = _seconds(rivals, rounds)
    return {name: images / statistics.median(each) for name, each in seconds.items()}


def _seconds(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival, round by round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in tqdm(range(rounds + 1), desc="rounds"):
        for name, work in rivals.items():
            started = time.perf_counter()
            work()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _agreement(jpegs: list[bytes], spec: ScoreSpec) -> Report:
    """Scores of DCT-scaled decodes against those of full decodes."""
    full = []
    for jpeg in jpegs:
        with Image.open(io.BytesIO(jpeg)) as image:
            whole = image.convert("RGB").resize((spec.size,) * 2, Image.Resampling.BOX)
            full.append(torch.from_numpy(np.array(whole)))
    scaled = [torch.from_numpy(decode(jpeg, spec.size)) for jpeg in jpegs]
    a, b = (spec.score(torch.stack(each)).flatten(1) for each in (scaled, full))
    ranks = [scores.argsort(1).argsort(1).float() for scores in (a, b)]
    correlations = [
        float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True)
    ]
    return {
        **_line(
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
    ray.init(num_cpus=2, ignore_reinit_error=True, logging_level="warning", log_to_driver=False)
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

        rates = _rates({"one": partial(score, 1), "two": partial(score, 2)}, len(urls), rounds)
    ray.shutdown()
    return _line(
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


def _resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextmanager
def _shards(patterns: list[str]) -> Iterator[list[str]]:
    """The given shards, or one of 500 made-up photos of 500 x 375 px, about 100 KB each."""
    if patterns:
        yield storage.expand(patterns)
        return
    with tempfile.TemporaryDirectory(prefix="famt-benchmark-") as folder:
        items = [Item(f"photo-{n}", 0, partial(_made_up_photo, n)) for n in range(500)]
        write_shards(
            items,
            folder,
            "photos",
            seed=0,
            samples_per_shard=500,
            encoding=Encoding(max_side=500, quality=95),
        )
        yield storage.expand([folder])


def _made_up_photo(seed: int) -> Image.Image:
    """Smooth shapes under noise that falls off with frequency, as a photo's spectrum does."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / 500)
    phase = np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
    waves = np.fft.irfft2(amplitude * phase, s=(375, 500)).transpose(1, 2, 0)
    levels = 128 + 50 * waves / waves.std()
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _object_cells(path: Path, grid: int) -> torch.Tensor:
    """`[grid * grid]` bool: cells that the object covers by more than half."""
    with Image.open(path) as mask:
        cells = mask.convert("L").resize((grid * 16, grid * 16), Image.Resampling.BOX)
    share = np.asarray(cells, np.float32).reshape(grid, 16, grid, 16).mean((1, 3)) / 255
    return torch.from_numpy(share.flatten() > 0.5)


def _auc(maps: torch.Tensor, truths: list[torch.Tensor]) -> float:
    """Mean over photos of the chance that an object cell outscores a background cell."""
    return statistics.mean(
        float(roc_auc_score(truth.numpy(), scores.flatten().numpy()))
        for scores, truth in zip(maps, truths, strict=True)
    )


if __name__ == "__main__":
    run_program(main, tyro.cli(Benchmark, description=__doc__))  # type: ignore[arg-type]
