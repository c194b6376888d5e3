"""Evaluators: a module each, with a class of options of the same name (`knn.py`, class `Knn`)."""

from functools import reduce
from operator import or_
from pkgutil import iter_modules, resolve_name
from typing import Any

from famt.train.config import TrainingOptions
from famt.train.evaluate.evaluation import Evaluation

_found: list[type[Evaluation]] = [
    resolve_name(f"{__name__}.{each.name}:{each.name.title()}") for each in iter_modules(__path__)
]
EVALUATORS = {
    each.evaluator(): each
    for each in sorted(_found, key=lambda each: issubclass(each, TrainingOptions))
}
"""by name; those that train the encoder come last"""

Evaluate: Any = reduce(or_, EVALUATORS.values())
"""one of them, as on the command line"""
