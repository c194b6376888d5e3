"""Linear classifiers on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen

from famt.train.evaluate.evaluation import Evaluation

Pooling = Literal["cls", "mean", "attentive"]


@dataclass(frozen=True)
class Probe(Evaluation):
    """Linear classifiers on the frozen encoder: class token, mean of patches, attentive pooling."""

    poolings: Annotated[tuple[Pooling, ...], MinLen(1)] = ("cls", "mean", "attentive")
    """features to classify: the class token (as in MAE's probe), the mean of the patch tokens, or
    their mean under learned attention, which keeps all N tokens of C values: N x C x 2 bytes per
    image"""
    learning_rates: Annotated[tuple[float, ...], Gt(0), MinLen(1)] = (1e-2, 3e-2)
    """learning rates of Adam to try, with cosine decay"""
    penalties: Annotated[tuple[float, ...], Ge(0), MinLen(1)] = (0.1, 1.0, 10.0, 100.0)
    """L2 penalties to try: 1 / C of scikit-learn's LogisticRegression, that is, times half the
    squared weights, added to the cross-entropy summed over images"""
    epochs: Annotated[int, Ge(1)] = 20
    """passes over the stored features, at least"""
    steps: Annotated[int, Ge(1)] = 1000
    """steps, at least; small sets get more passes"""
    step_images: Annotated[int, Ge(1)] = 1024
    """images per step"""
    hold_out: Annotated[float, Gt(0), Le(0.5)] = 0.1
    """share of the training images held out to choose learning rate, penalty and pooling"""

    measured_by: ClassVar = "classifiers:probe"
    metrics: ClassVar = {
        "Probe, class token": "top1_cls",
        "Probe, mean of patches": "top1_mean",
        "Probe, attentive pooling": "top1_attentive",
    }
