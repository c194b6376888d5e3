"""Benchmarks: each figure beside the bound that it is held against.

    famt benchmark step --model vit_base
    famt benchmark precompute loader --threads 2 step    # several in one go

Prints JSON lines: figure, bound, their ratio. Rivals take turns round by round and are compared by
their medians, so a busy machine slows all of them alike. Without --shards, benchmarks make
synthetic photos of ImageNet's usual size.
"""

from __future__ import annotations

import json
import sys
from typing import Any, get_args

import tyro

from famt.__main__ import called
from famt.jobs.benchmarks.loader import Loader
from famt.jobs.benchmarks.precompute import Precompute
from famt.jobs.benchmarks.quality import Quality
from famt.jobs.benchmarks.refresh import Refresh
from famt.jobs.benchmarks.runs import Runs
from famt.jobs.benchmarks.scale import Scale
from famt.jobs.benchmarks.step import Attention, Step
from famt.train.command_line import run_program

Benchmark = Precompute | Loader | Step | Attention | Refresh | Runs | Quality | Scale
BENCHMARKS: dict[str, Any] = {each.__name__.lower(): each for each in get_args(Benchmark)}


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
