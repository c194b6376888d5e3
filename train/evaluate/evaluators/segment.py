"""Semantic segmentation by a linear classifier of the patch tokens of a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from famt.pipeline.options import RandomView
from famt.train.evaluate.evaluation import Evaluation


@dataclass(frozen=True)
class Segment(Evaluation):
    """Linear segmentation: patch tokens against the masks `<key>.mask.png` in the shards."""

    learning_rate: Annotated[float, Gt(0)] = 1e-2
    """learning rate of Adam, with cosine decay"""
    epochs: Annotated[int, Ge(1)] = 20
    """passes over the images, at least, each with new crops"""
    steps: Annotated[int, Ge(1)] = 500
    """steps, at least; small sets get more passes"""
    step_images: Annotated[int, Ge(1)] = 32
    """crops per step"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.25, 1.0)))
    """crops to learn from; tests use whole images"""

    measured_by: ClassVar = "patch_classifier:segment"
    metrics: ClassVar = {"Segmentation, mean IoU": "miou"}
