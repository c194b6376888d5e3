"""Run a program as if on a machine of its own: on_machine.py <name> <module or file> ..."""

import runpy
import sys

from famt.train import distributed

name, program, *arguments = sys.argv[1:]
distributed.machine = lambda: name
sys.argv = [program, *arguments]
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
