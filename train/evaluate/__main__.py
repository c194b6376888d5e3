"""Evaluate a pre-trained encoder.

    famt evaluate knn --checkpoint runs/first --cache scores/ \\
        --train 'shards/train-*.tar' --val 'shards/val-*.tar'

Prints a table, or one JSON line with --json. If the encoder is from a run of ours, the result is
also added to that run's log and TensorBoard curves.
"""

from __future__ import annotations

from famt.train.command_line import parsed, run_program
from famt.train.evaluate.evaluators import Evaluate
from famt.train.evaluate.run import run as main

if __name__ == "__main__":
    run_program(main, parsed(Evaluate, __doc__))
