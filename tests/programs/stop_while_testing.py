"""A module of `train` whose main rank is asked to stop as it begins to test for the n-th time.

stop_while_testing.py <n> <module> ...
"""

import os
import runpy
import signal
import sys

from famt.train.evaluate.features import Images

number, module, *arguments = sys.argv[1:]
crops, begun = Images.crops, []


def interrupted(images, *positional, **options):
    begun.append(images)
    for batch in crops(images, *positional, **options):
        if os.environ["RANK"] == "0" and len(begun) == int(number):
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


Images.crops = interrupted
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
