"""Generations: whole-image maps that a model in training gave, as training takes them up."""

from __future__ import annotations

from dataclasses import dataclass

from famt.pipeline.scores import ModelScoreSpec


@dataclass(frozen=True)
class Generation:
    """Maps of all images of a data set from one encoder.

    Attributes:
        run: id of the training run.
        step: optimiser steps that the encoder had done.
        specs: what was computed, alike but for their kinds.
        data: `SampleTable.digest` of the shards.
        images: how many were scored.
    """

    run: str
    step: int
    specs: list[ModelScoreSpec]
    data: str
    images: int
