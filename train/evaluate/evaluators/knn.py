"""k-nearest-neighbour classification by the features as they are; nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from famt.train.evaluate.evaluation import Evaluation


@dataclass(frozen=True)
class Knn(Evaluation):
    """Classify by a vote of the nearest training images; nothing is learned."""

    k: Annotated[int, Ge(1)] = 20
    """number of neighbours that vote"""
    temperature: Annotated[float, Gt(0)] = 0.07
    """a neighbour at cosine similarity s has exp(s / temperature) votes"""

    measured_by: ClassVar = "neighbours:classify"
    metrics: ClassVar = {"k-NN, class token": "top1_cls", "k-NN, mean of patches": "top1_mean"}
