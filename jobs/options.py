"""The options of the programs that a user submits."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Le, Lt

from famt.pipeline.errors import UserError
from famt.pipeline.options import MAIN, Checked, Encoding, Seed
from famt.pipeline.scores import ScoreSpec
from famt.train.config import Pretrain


@dataclass(frozen=True)
class RefreshWorkers:
    """What a refresh may use of the cluster."""

    workers: Annotated[int | None, Ge(1)] = None
    """actors; as many as the cluster has room for now if left out"""
    cpus_per_worker: Annotated[int, Ge(1)] = 1
    """CPU cores, and decoding threads, of each"""
    gpus_per_worker: Annotated[float | None, Ge(0)] = None
    """share of a GPU for each; 0 computes on the CPU. A quarter if left out, where the run trains
    on GPUs and the cluster has any"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images at a time"""


@dataclass(frozen=True)
class RayPretrain(Pretrain):
    """A pre-training run and the workers that it runs on."""

    data: Annotated[str | None, MAIN] = None
    """images to train on, in place of --shards and --cache: a folder, or a data set that `famt
    shards` knows. Shards and scores of them are made in <out>/data first; without --model or
    --recipe a model that suits them and the machine is chosen"""
    workers: Annotated[int, Ge(0), MAIN] = 0
    """ranks that Ray Train starts on the cluster; 0 trains in this process, without Ray Train"""
    gpu: bool = False
    """a GPU for each of them"""
    cpus_per_worker: Annotated[int | None, Ge(1)] = None
    """CPU cores for each worker; also its decoding threads, unless --threads says otherwise. If
    left out, 1 without GPUs, and with them a GPU's share of its machine's cores, 16 at most"""
    max_failures: Annotated[int, Ge(-1)] = 3
    """times that the run is started again after a worker was lost; -1 for any number"""
    refresher: RefreshWorkers = field(default_factory=RefreshWorkers)

    @classmethod
    def with_suggestions(cls, arguments: list[str]) -> list[str]:
        """What --data stands for, before the rest, which overrides it."""
        if "--help" in arguments:
            return arguments
        given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        given.add_argument("--data")
        given.add_argument("--out", type=Path)
        found, _ = given.parse_known_args(arguments)
        if found.data is None or found.out is None:
            return arguments
        from famt.jobs.from_images import suggested

        return [*suggested(found.data, found.out, arguments), *arguments]


@dataclass(frozen=True)
class MakeShards(Checked):
    """What to write where."""

    source: str
    """a folder of images, of class folders, or of images and masks; or a data set: digits, cifar10,
    cifar100, flowers102, food101 or stl10"""
    out: str
    """folder or object-store URL for the shards"""
    split: str = "train"
    """prefix of the shards; a named data set gives its training images for "train", else its test
    images"""
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """share of the images that goes to split "val" in place of this one"""
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    """images a tar; ImageNet is usually cut at 1000 (about 110 MB)"""
    labels: Path | None = None
    """a table of the images' classes: CSV with columns like file_name and label, or Tiny ImageNet's
    val_annotations.txt"""
    unlabelled: bool = False
    """folders tell where images lie, not what they show: leave classes out"""
    seed: Seed = 0
    """of the shuffle"""
    encoding: Encoding = field(default_factory=Encoding)
    download_to: str | None = None
    """where torchvision keeps what it downloads"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and self.unlabelled:
            raise UserError("--labels and --unlabelled contradict each other")
        if self.holdout and self.split == "val":
            raise UserError('holdout makes a split "val" of its own; give this one another split')
        # Shards are found by <split>-*.tar, and DALI must be able to read their names.
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.split):
            raise UserError(f"split {self.split!r} may hold letters, digits, _, . and - alone")


@dataclass(frozen=True)
class PrecomputeFreq(Checked):
    """What to score and where to put it."""

    shards: list[str]
    """tars, folders of tars, wildcards or brace patterns (in quotes)"""
    cache: str
    """folder or object-store URL of the score cache; made if it is not there"""
    spec: ScoreSpec = field(default_factory=ScoreSpec)
    watch: str | None = None
    """run for ever: look again after this time (30s, 10m, 2h) for shards that are new or changed;
    a training run that starts after that takes them up"""
    workers: Annotated[int | None, Ge(1)] = None
    """tasks at a time; all CPUs of the cluster if left out"""
    max_bad: Annotated[float, Ge(0), Le(1)] = 0.01
    """share of images that may be quarantined before the job counts as failed"""
    max_damaged: Annotated[int, Ge(0)] = 0
    """tars that may be cut off or broken before the job counts as failed"""
    retry_bad: bool = False
    """judge all images of these shards again, the quarantined among them. A shard on which a
    verdict changes gets new rows: its maps of other scores have to be computed again, and runs that
    trained on it can't be resumed"""
    summary: str | None = None
    """file to write the JSON summary to as well"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch is not None:
            seconds(self.watch)
            if self.retry_bad:
                raise UserError("retry_bad is for one run; it would judge all again at each look")


def seconds(duration: str) -> float:
    """Those of a time such as 30s, 10m or 2h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", duration)
    if match is None:
        raise UserError(f"--watch {duration}: give a time such as 30s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


@dataclass(frozen=True)
class RefreshScores(RefreshWorkers, Checked):
    """Which encoder to score with, and on what."""

    checkpoint: Path | None = None
    """checkpoint, folder of a run (its latest one), or an encoder that a run left for refresh"""
    follow: Path | None = None
    """folder of a run: score with every encoder that it leaves for refresh, until it is finished"""
    init: str | None = None
    """any other encoder, as --init of pre-training takes it: a run that pins the generation weighs
    by a trained model from its first step on"""
    out: Path | None = None
    """folder for the generation of a --checkpoint or an --init"""
    image_size: Annotated[int | None, Ge(1)] = None
    """side of the images that an --init sees, px, in place of its own; its patches must be as many
    as those of the crops of the run that pins the maps"""
    shards: list[str] | None = None
    """tars to score; those of the run if left out"""
    cache: str | None = None
    """score cache; that of the run if left out"""
    kinds: list[str] | None = None
    """token_frequency, attention, cls_attention, frequency_attention (the first times the second,
    the paper's weight), or kinds that an installed package adds; what the run weighs by if left
    out"""
    precision: Literal["bf16", "fp32"] | None = None
    """bf16 computes under autocast; the run's if left out"""


@dataclass(frozen=True)
class Results(Checked):
    """Which grid, how much of it, and what each run is given."""

    grid: Annotated[Path, tyro.conf.Positional]
    """TOML file, or the .json.gz of logs of a grid that is published"""
    out: Path | None = None
    """folder of runs, table and page, in place of the one that the file names"""
    minutes: Annotated[float | None, Ge(0)] = None
    """stop after so many; runs go on another time"""
    cpus: Annotated[int, Ge(1)] = 1
    """CPU cores of each run; small models train fastest with many runs of one core"""
    gpus: Annotated[float, Ge(0)] = 0
    """GPUs of each run, all on one machine; 0.25 lets four small runs share one"""


@dataclass(frozen=True)
class Demo(Checked):
    """What to run the demo on."""

    data: str = "digits"
    """a folder of images or of class folders; scikit-learn's digits if left out"""
    out: Path = Path("demo")
    """folder for shards, scores, the run and pictures; a fresh one inside it each time"""
    images_seen: Annotated[int, Ge(1)] = 120_000
    """training is as many epochs as show the model about this many images"""
