"""What all benchmarks share: lines with a bound, rivals in turns, shards to measure on."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from famt.pipeline.cache import ScoreCache
from famt.pipeline.options import Encoding
from famt.pipeline.patterns import expand_shards
from famt.pipeline.precompute import precompute_shard
from famt.pipeline.publish import publish
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.sources import Item
from famt.pipeline.writer import write_shards

Report = dict[str, object]


def line(name: str, unit: str, figure: float, against: str, bound: float) -> Report:
    """What a benchmark prints: a figure beside its bound, and their ratio."""
    return {
        "benchmark": name,
        "figure": round(figure, 4),
        "unit": unit,
        "bound": round(bound, 4),
        "against": against,
        "ratio": round(figure / bound, 3),
    }


def rates(rivals: Mapping[str, Callable[[], object]], images: int, rounds: int) -> dict[str, float]:
    """Median images/s of each rival; other arguments as in `seconds`."""
    taken = seconds(rivals, rounds)
    return {name: images / statistics.median(each) for name, each in taken.items()}


def seconds(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each rival, taking turns, round by round, after a round that does not count.

    Args:
        rivals: what is timed, by name.
        rounds: turns of each that count.
        pause: seconds between turns, for what a rival leaves running to come to rest.
        clock: what the seconds are of; `time.process_time` leaves out what other processes take.
    """
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in tqdm(range(rounds + 1), desc="rounds"):
        for name, work in rivals.items():
            time.sleep(pause)
            started = clock()
            work()
            if round_:
                taken[name].append(clock() - started)
    return taken


def resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextmanager
def shards(patterns: list[str], photos: int = 500) -> Iterator[list[str]]:
    """The given shards, or one of so many made-up photos of 500 x 375 px, about 100 KB each."""
    if patterns:
        yield expand_shards(patterns)
        return
    with tempfile.TemporaryDirectory(prefix="famt-benchmark-") as folder:
        items = [Item(f"photo-{n}", 0, partial(_made_up_photo, n)) for n in range(photos)]
        write_shards(
            items,
            folder,
            "photos",
            seed=0,
            samples_per_shard=photos,
            encoding=Encoding(max_side=500, quality=95),
        )
        yield expand_shards([folder])


def _made_up_photo(seed: int) -> Image.Image:
    """Smooth shapes under noise that falls off with frequency, as a photo's spectrum does."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / 500)
    phase = np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
    waves = np.fft.irfft2(amplitude * phase, s=(375, 500)).transpose(1, 2, 0)
    levels = 128 + 50 * waves / waves.std()
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@contextmanager
def scored(patterns: list[str], photos: int = 500) -> Iterator[tuple[list[str], ScoreCache]]:
    """The shards as `shards` gives them, and a temporary cache that holds their default score."""
    with shards(patterns, photos) as urls, tempfile.TemporaryDirectory() as folder:
        cache = ScoreCache(folder, create=True)
        for url in tqdm(urls, desc="scoring", unit="shard"):
            publish([precompute_shard(url, cache, ScoreSpec())], cache, ScoreSpec())
        yield urls, cache
