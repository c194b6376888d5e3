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

from famt.train.evaluate.options import Evaluate
from famt.train.evaluate.run import run as main
from famt.train.program import parsed, run_program

if __name__ == "__main__":
    run_program(main, parsed(Evaluate, __doc__))
