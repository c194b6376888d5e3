"""The options of `famt export`, `embed`, `figures` and `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge

from famt.pipeline.options import Checked, RandomView, Seed
from famt.train.evaluate.evaluation import EncoderOptions


@dataclass(frozen=True)
class Export:
    """Which encoder to export, and in which format."""

    checkpoint: tyro.conf.Positional[Path]
    """checkpoint file, or folder of a run, whose last checkpoint is taken"""
    to: Literal["timm", "mae", "hf"]
    """format: of timm, of the MAE authors' code, or of Hugging Face transformers"""
    out: Path
    """folder to create; must not exist"""
    ema: bool = False
    """export the averaged weights of a run with --optimiser.ema-decay; without the decoder, which
    is not averaged"""


@dataclass(frozen=True, kw_only=True)
class Embed(EncoderOptions):
    """Which images to embed, and with what."""

    shards: list[str]
    """tars, folders of tars, wildcards or brace patterns (quoted)"""
    out: Path
    """<name>.parquet, or a folder for .npy files; must not exist"""


@dataclass(frozen=True)
class Figures(Checked):
    """Which checkpoint and images to draw."""

    checkpoint: Path
    """checkpoint file, or folder of a run"""
    cache: str
    """score cache with the shards' scores"""
    shards: list[str]
    """shards to take images from"""
    out: Path
    """PNG file to write"""
    images: Annotated[int, Ge(1)] = 6
    """number of images, one per row"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.6, 1.0)))
    seed: Seed = 0
    """seed of the choice of images, crops and splits"""


@dataclass(frozen=True)
class Report:
    """Which runs to compare."""

    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """HTML page to write"""
