"""What all benchmarks share: output lines with a bound, rivals in turns, and test data."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
from PIL import Image

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.options import Encoding
from famt.pipeline.progress import progress_bar
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import precompute_shard
from famt.pipeline.scoring.publish import publish
from famt.pipeline.sharding.patterns import expand_shards
from famt.pipeline.sharding.sources import Item
from famt.pipeline.sharding.writer import write_shards

Report = dict[str, object]


def line(name: str, unit: str, figure: float, against: str, bound: float) -> Report:
    """A line of output: a figure, its bound, and their ratio."""
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
    """Seconds of each rival by round. Rivals take turns; a first, untimed round warms up.

    Args:
        rivals: functions to time, by name.
        rounds: timed turns of each.
        pause: seconds between turns, in which background threads of a rival settle.
        clock: `time.process_time` excludes the time of other processes.
    """
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in progress_bar(range(rounds + 1), desc="rounds"):
        for name, work in rivals.items():
            time.sleep(pause)
            started = clock()
            work()
            if round_:
                taken[name].append(clock() - started)
    return taken


@contextmanager
def shards(patterns: list[str], photos: int = 500) -> Iterator[list[str]]:
    """The given shards; if none, one shard of synthetic photos, 500 x 375 px and 100 KB each."""
    if patterns:
        yield expand_shards(patterns)
        return
    with tempfile.TemporaryDirectory(prefix="famt-benchmark-") as folder:
        items = [Item(f"photo-{n}", 0, partial(_synthetic_photo, n)) for n in range(photos)]
        encoding = Encoding(max_side=500, quality=95)
        write_shards(items, folder, "photos", seed=0, samples_per_shard=photos, encoding=encoding)
        yield expand_shards([folder])


def _synthetic_photo(seed: int) -> Image.Image:
    """Noise with the 1/f spectrum of natural images."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / 500)
    phase = np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
    waves = np.fft.irfft2(amplitude * phase, s=(375, 500)).transpose(1, 2, 0)
    levels = 128 + 50 * waves / waves.std()
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@contextmanager
def scored(patterns: list[str], photos: int = 500) -> Iterator[tuple[list[str], ScoreCache]]:
    """The shards of `shards`, and a temporary cache with their default scores."""
    with shards(patterns, photos) as urls, tempfile.TemporaryDirectory() as folder:
        cache = ScoreCache(folder, create=True)
        for url in progress_bar(urls, desc="scoring", unit="shard"):
            publish([precompute_shard(url, cache, ScoreSpec())], cache, ScoreSpec())
        yield urls, cache
