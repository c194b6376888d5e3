"""Ranks that talk for a while; what one of them does meanwhile is an argument."""

import os
import signal
import sys
import time

from famt.pipeline.errors import UserError
from famt.train.command_line import run_program
from famt.train.distributed import join_ranks

deed, doer = sys.argv[1], int(sys.argv[2])


def main(_: None) -> None:
    with join_ranks("cpu") as ranks:
        for n in range(600):
            ranks.gather(n)
            if ranks.rank == doer and n == 5:
                if deed == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if deed == "errs":
                    raise UserError("no such thing")
                raise RuntimeError("a defect")
            time.sleep(0.05)


run_program(main, None)
