"""The options of the programs that read what a training left: export, embed, figures and report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Gt, Le

from famt.pipeline.options import Checked, RandomView, Seed


@dataclass(frozen=True)
class Export:
    """What to export, and where to."""

    checkpoint: tyro.conf.Positional[Path]
    """checkpoint file, or folder of a run (its latest one)"""
    to: Literal["timm", "mae", "hf"]
    """whose layout: timm's, the MAE authors', or that of Hugging Face transformers"""
    out: Path
    """folder to write; must not be there yet"""
    ema: bool = False
    """take the averaged weights of the encoder, of a run with --optimiser.ema-decay; the decoder,
    which is not averaged, stays behind"""


@dataclass(frozen=True)
class Embed(Checked):
    """Which images to embed, and with what."""

    checkpoint: str
    """run, checkpoint, or any other encoder that --init takes (see docs/export.md)"""
    cache: str
    """score cache; it comes to know the shards that it does not"""
    shards: list[str]
    """tars, folders of tars, wildcards or brace patterns (in quotes)"""
    out: Path
    """<name>.parquet, or a folder for .npy files; must not be there yet"""
    stage: Path | None = None
    """folder on a fast local disk that the shards are fetched into first; what is there of any
    earlier run is used"""
    ema: bool = False
    """take the averaged weights of the encoder, of a run with --optimiser.ema-decay"""
    centre: Annotated[float | None, Gt(0), Le(1)] = None
    """share of the shorter side that is shown; 0.875, or all of it up to 64 px"""
    batch_size: Annotated[int, Ge(1)] = 256
    """images at a time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """what to compute on"""
    threads: Annotated[int | None, Ge(1)] = None
    """CPU threads that decode; all of the machine's cores if left out"""


@dataclass(frozen=True)
class Figures(Checked):
    """A picture of a checkpoint at work."""

    checkpoint: Path
    """checkpoint file, or folder of a run"""
    cache: str
    """score cache that knows the shards"""
    shards: list[str]
    """where the images come from"""
    out: Path
    """PNG file to write"""
    images: Annotated[int, Ge(1)] = 6
    """rows of the picture"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.6, 1.0)))
    seed: Seed = 0
    """of the choice of images, their crops and their splits"""


@dataclass(frozen=True)
class Report:
    """Which runs to tell of."""

    runs: Annotated[list[Path], tyro.conf.Positional]
    """folders of runs"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """page to write"""


@dataclass(frozen=True)
class Recipes:
    """Which recipe to show."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """one of them, or the path of a file of your own; all in a line each if left out"""
