"""A module of `train` of which one rank is asked to stop in the midst of a step.

stop_at_a_step.py <rank> <steps done> <module> ...
"""

import os
import runpy
import signal
import sys

from famt.train.loop import Training

rank, steps, module, *arguments = sys.argv[1:]
update = Training.update


def interrupted(run):
    if (run.ranks.rank, run.step) == (int(rank), int(steps)):
        os.kill(os.getpid(), signal.SIGTERM)
    update(run)


Training.update = interrupted
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
