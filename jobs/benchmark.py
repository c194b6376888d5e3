"""Benchmarks: each figure beside the bound that it is held against.

    famt benchmark step --model vit_base
    famt benchmark precompute loader --threads 2 step    # several in one go

    precompute  images/s of scoring on one core, against decoding alone; Ray workers (--shards)
    loader      crops/s of the loader, against a bare DALI graph and torchvision (--shards)
    step        time, FLOPs and memory of a training step, against plain MAE
    attention   time of a step with each signal, against a step without
    refresh     images/s of refreshing maps, against the bare forward pass; its cost in epochs
    runs        crops/s of whole training runs by recipe, against MAE
    quality     how well each kind of score separates objects from background (--photos --masks)
    scale       time and memory to start a run on many shards

Prints JSON lines: figure, bound, their ratio. Rivals take turns round by round and are compared by
their medians, so a busy machine slows all of them alike. Without --shards, benchmarks make
synthetic photos of ImageNet's usual size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import tyro

from famt.__main__ import called
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.precompute import Precompute
from famt.jobs.benchmarks.quality import Quality
from famt.jobs.benchmarks.refresh import Refresh
from famt.jobs.benchmarks.runs import Runs
from famt.jobs.benchmarks.scale import Scale
from famt.jobs.benchmarks.step import Attention, Step
from famt.train.command_line import run_program


class Benchmark(Protocol):
    """A benchmark and its options."""

    def run(self) -> Iterator[Report]:
        """Measure; yield the lines one by one."""
        ...


BENCHMARKS: dict[str, Any] = {
    "precompute": Precompute,
    "loader": Loader,
    "step": Step,
    "attention": Attention,
    "refresh": Refresh,
    "runs": Runs,
    "quality": Quality,
    "scale": Scale,
}


def parse(arguments: list[str]) -> list[Benchmark]:
    """The benchmarks of a command line, each with the options after its name."""
    starts = [n for n, argument in enumerate(arguments) if n and argument in BENCHMARKS]
    ends = [*starts, len(arguments)]
    parts = [arguments[start:end] for start, end in zip([0, *starts], ends, strict=True)]
    parser = tyro.extras.subcommand_cli_from_dict
    return [parser(BENCHMARKS, prog=called(), args=each, description=__doc__) for each in parts]


def main(benchmarks: list[Benchmark]) -> None:
    """Run the benchmarks and print their lines."""
    for benchmark in benchmarks:
        for line in benchmark.run():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(lambda arguments: main(parse(arguments)), sys.argv[1:])
