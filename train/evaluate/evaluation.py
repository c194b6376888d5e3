"""What all evaluators have: options, and what they measure."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from famt.pipeline.options import FREE, PLACE, Checked, Seed, differing
from famt.train.config import APART, Device


@dataclass(frozen=True)
class EncoderOptions(Checked):
    """Which encoder to read images with, and how."""

    checkpoint: Annotated[str, APART]
    """run, checkpoint, or any other encoder that --init takes (see docs/export.md)"""
    cache: Annotated[str, FREE, PLACE]
    """score cache; shards it does not know yet are added"""
    stage: Annotated[Path | None, FREE, PLACE] = None
    """folder on a fast local disk; each machine copies the shards there first and reuses what
    earlier runs copied"""
    ema: Annotated[bool, APART] = False
    """use the averaged weights of the encoder, of a run with --optimiser.ema-decay"""
    centre: Annotated[float | None, Gt(0), Le(1)] = None
    """side of the central crop, as a share of the image's shorter side; if not given, 0.875,
    or 1 for models of up to 64 px"""
    batch_size: Annotated[int, Ge(1)] = 256
    """images per batch"""
    device: Device = "auto"
    """where to compute; auto takes a GPU if there is one"""
    threads: Annotated[int | None, Ge(1), FREE] = None
    """CPU threads that decode; the rank's share of the cores if not given"""


@dataclass(frozen=True, kw_only=True)
class Evaluation(EncoderOptions):
    """What every evaluation needs."""

    train: Annotated[list[str], FREE, PLACE]
    """shards to learn from"""
    val: Annotated[list[str], FREE, PLACE]
    """shards to test on"""
    untrained: Annotated[bool, APART] = False
    """use the same encoder with fresh random weights: the floor to beat"""
    seed: Seed = 0
    """seed of all random draws"""
    json: Annotated[bool, FREE] = False
    """print one JSON line instead of a table"""

    measured_by: ClassVar[str]
    """`module:function` in this package: takes an encoder, training images, test images and these
    options, and yields each value with its name"""
    metrics: ClassVar[dict[str, str]] = {}
    """title in tables and reports -> name of a measured value, in [0, 1]"""

    def conditions(self) -> dict[str, Any]:
        """What the result depends on besides the encoder, as plain data: the shards, and the
        options that differ from their defaults."""
        needed = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.default is each.default_factory is MISSING
        }
        options = {"train": self.train, "val": self.val} | {
            name: value
            for name, value, notes in differing(self, **needed)
            if not {APART, FREE} & {*notes}
        }
        plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
        return plain

    @classmethod
    def evaluator(cls) -> str:
        """Name of the evaluator: its command and module."""
        return cls.__name__.lower()

    @property
    def weights(self) -> str:
        """Which weights are evaluated: trained, ema or untrained."""
        return "untrained" if self.untrained else "ema" if self.ema else "trained"
