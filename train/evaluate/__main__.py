"""Evaluate a pre-trained encoder.

    famt evaluate knn --checkpoint runs/first --cache scores/ \\
        --train 'shards/train-*.tar' --val 'shards/val-*.tar'

    knn       the classes of the nearest training images: nothing is learned
    probe     linear classifiers on the frozen encoder, and attentive pooling
    segment   a linear classifier of the patches of the frozen encoder, against masks
    finetune  encoder and classifier trained together; a run of its own in --out

Prints a table, or one JSON line (--json), which is also added to the log of the run and to its
TensorBoard curves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from famt.train.evaluate.run import EVALUATORS, run
from famt.train.evaluate.trunk import Evaluation
from famt.train.program import called, run_program

if __name__ == "__main__":
    commands: dict[str, Callable[..., Evaluation]] = {
        name: options for name, (options, _) in EVALUATORS.items()
    }
    run_program(
        lambda arguments: run(
            tyro.extras.subcommand_cli_from_dict(
                commands, prog=called(), args=arguments, description=__doc__
            )
        ),
        sys.argv[1:],
    )
