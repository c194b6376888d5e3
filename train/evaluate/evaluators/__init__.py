"""Evaluators: a module each, with a class of options."""

from typing import Any

from famt.train.evaluate.evaluation import Evaluation
from famt.train.evaluate.evaluators.finetune import Finetune
from famt.train.evaluate.evaluators.knn import Knn
from famt.train.evaluate.evaluators.probe import Probe
from famt.train.evaluate.evaluators.segment import Segment

EVALUATORS: dict[str, type[Evaluation]] = {
    each.evaluator(): each for each in (Knn, Probe, Segment, Finetune)
}
"""by name; those that train the encoder come last"""

Evaluate: Any = Knn | Probe | Segment | Finetune
"""one of them, as on the command line"""
