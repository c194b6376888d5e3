"""Ranks that talk until they are asked to stop; what one of them does else is an argument."""

import sys
import time
from pathlib import Path

from famt.pipeline.errors import CacheError
from famt.train.distributed import join_ranks
from famt.train.program import run_program
from famt.train.streams import Stop

folder, deed = Path(sys.argv[1]), sys.argv[2]


def main(_: None) -> None:
    with join_ranks("cpu") as ranks, Stop(ranks.lifeline) as stop:
        (folder / f"rank{ranks.rank}").touch()
        while deed == "main waits" and ranks.is_main and not stop.asked:
            time.sleep(0.01)
        if deed == "main writes to a slow disk" and ranks.is_main:
            time.sleep(600)
        for n in range(600):
            if any(ranks.gather(stop.asked)):
                return
            if deed == "rank 1 errs" and ranks.rank == 1 and n == 5:
                raise CacheError("no such thing")
            if deed == "rank 1 has a defect" and ranks.rank == 1 and n == 5:
                raise RuntimeError("a defect")
            time.sleep(0.05)


run_program(main, None)
