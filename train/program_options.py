"""The options of `famt export`, `embed`, `figures`, `report` and `recipes`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Gt, Le

from famt.pipeline.options import Checked, RandomView, Seed


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


@dataclass(frozen=True)
class Embed(Checked):
    """Which images to embed, and with what."""

    checkpoint: str
    """run, checkpoint, or any other encoder that --init takes (see docs/export.md)"""
    cache: str
    """score cache; shards it does not know yet are added"""
    shards: list[str]
    """tars, folders of tars, wildcards or brace patterns (quoted)"""
    out: Path
    """<name>.parquet, or a folder for .npy files; must not exist"""
    stage: Path | None = None
    """folder on a fast local disk to copy the shards to first; copies of earlier runs are reused"""
    ema: bool = False
    """use the averaged weights of a run with --optimiser.ema-decay"""
    centre: Annotated[float | None, Gt(0), Le(1)] = None
    """side of the central crop, as a share of the image's shorter side; if not given, 0.875,
    or 1 for models of up to 64 px"""
    batch_size: Annotated[int, Ge(1)] = 256
    """images per batch"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes a GPU if there is one"""
    threads: Annotated[int | None, Ge(1)] = None
    """CPU threads that decode; all cores if not given"""


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


@dataclass(frozen=True)
class Recipes:
    """Which recipe to show."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """a recipe, or the path of your own file; if not given, all are listed"""
