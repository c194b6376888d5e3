"""Measure what the project promises, each figure beside the bound it is held against.

    famt benchmark step --model vit_base
    famt benchmark precompute loader --threads 2 step    # one after another

    precompute  images/s of scoring on one core, beside those of only decoding (--shards)
    loader      crops/s of the loader with join and sampling, beside the bare DALI graph and
                torchvision's DataLoader (--shards)
    step        time, FLOPs and memory of FAMT's training steps, beside plain MAE's
    attention   time of a step with each signal, beside one without
    refresh     images/s of making maps anew with an encoder, beside its bare forward, and what
                that costs beside an epoch of training
    runs        crops/s of whole trainings by recipe, beside MAE's, and what they wait for
    quality     how well each kind of map tells objects from background (--photos --masks)
    scale       time and memory to start with many shards

Prints JSON lines: the figure, the bound from the same run, and their ratio. Rivals are measured in
turn, round after round, and compared by their medians: a machine's mood hits them alike. Without
`--shards`, photos of ImageNet's usual size are made up.
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
from famt.train.program import run_program


class Benchmark(Protocol):
    """Options of a measurement, and the measurement."""

    def run(self) -> Iterator[Report]:
        """Yield the lines as they come."""
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
    """The benchmarks named on a command line, each with the options that follow its name."""
    starts = [n for n, argument in enumerate(arguments) if n and argument in BENCHMARKS]
    ends = [*starts, len(arguments)]
    parts = [arguments[start:end] for start, end in zip([0, *starts], ends, strict=True)]
    parser = tyro.extras.subcommand_cli_from_dict
    return [parser(BENCHMARKS, prog=called(), args=each, description=__doc__) for each in parts]


def main(benchmarks: list[Benchmark]) -> None:
    """Print the benchmarks' lines as they come."""
    for benchmark in benchmarks:
        for line in benchmark.run():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_program(lambda arguments: main(parse(arguments)), sys.argv[1:])
