"""Options of the programs in this package."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from annotated_types import Ge, Le, Lt

from famt.__main__ import called
from famt.pipeline.errors import UserError
from famt.pipeline.options import FREE, MAIN, PLACE, Checked, Encoding, Seed
from famt.pipeline.scores import ScoreSpec
from famt.train.config import Pretrain

_WITHOUT_DATA = tyro.conf.arg(help_behavior_hint="(needed without --data)")


@dataclass(frozen=True)
class RefreshWorkers:
    """Resources of a refresh on the cluster."""

    workers: Annotated[int | None, Ge(1)] = None
    """number of actors; as many as fit now if left out"""
    cpus_per_worker: Annotated[int | None, Ge(1)] = None
    """CPU cores and decoding threads per actor. If left out: up to four for an actor of a
    whole GPU, else 1"""
    gpus_per_worker: Annotated[float | None, Ge(0)] = None
    """share of a GPU per actor; 0 computes on CPUs. If left out: a quarter if the run trains on
    GPUs and the cluster has any, else 0"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images per forward pass"""


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """Images that have no shards yet."""

    data: Annotated[str | None, MAIN] = None
    """images to train on, in place of --shards and --cache: a folder, or a named data set of `famt
    shards`. Their shards and scores go to <out>/data. Model, sizes and length are chosen to suit
    the images and the machine, unless they are given or set by a recipe"""
    labels: Path | None = None
    """table of the classes of --data's images, as for `famt shards`"""


@dataclass(frozen=True, kw_only=True)
class RayPretrain(Pretrain, Data):
    """A pre-training run and its workers."""

    shards: Annotated[list[str], FREE, PLACE, MAIN, _WITHOUT_DATA] = field(default_factory=list)
    """tars, folders of tars, wildcards or brace patterns (quoted)"""
    cache: Annotated[str, FREE, PLACE, MAIN, _WITHOUT_DATA] = ""
    """folder or object-store URL of the score cache"""
    workers: Annotated[int, Ge(0), MAIN] = 0
    """ranks that Ray Train starts on the cluster; 0 trains in this process"""
    gpu: bool = False
    """give each worker a GPU"""
    cpus_per_worker: Annotated[int | None, Ge(1)] = None
    """CPU cores per worker, and decoding threads unless --threads is given. If left out: 1 without
    GPUs; with GPUs, the cores of a machine divided by its GPUs, at most 16"""
    max_failures: Annotated[int, Ge(-1)] = 3
    """restarts after a lost worker; -1 for any number"""
    refresher: RefreshWorkers = field(default_factory=RefreshWorkers)

    @classmethod
    def with_suggestions(cls, arguments: list[str], default: Self) -> list[str]:
        """The options that --data implies, followed by the given ones, which override them.

        What is wrong with the given ones is told before the images are looked at.
        """
        if arguments and not arguments[0].startswith("-"):
            raise UserError(f"{arguments[0]!r} belongs to an option: --data {arguments[0]}?")
        words = [each.partition("=")[0] for each in arguments]
        if "--help" in words or "--data" not in words:
            return arguments
        given = tyro.cli(cls, prog=called(), args=arguments, default=default)
        if given.workers or "RANK" in os.environ:
            if os.environ.get("RANK", "0") != "0":
                time.sleep(10)  # torchrun ends this rank with the main one, which says why
            raise UserError(
                "--data trains in one process; for several ranks make shards with `famt shards`, "
                "scores with `famt score`, and give --shards and --cache"
            )
        from famt.jobs.from_images import suggested

        return [*suggested(given, words), *arguments]


@dataclass(frozen=True)
class MakeShards(Checked):
    """Images to read, shards to write."""

    source: str
    """folder of images, of class folders, or of images and masks; or a named data set: digits,
    cifar10, cifar100, flowers102, food101 or stl10"""
    out: str
    """folder or object-store URL for the shards"""
    split: str = "train"
    """prefix of the shards; named data sets give training images for "train", else test images"""
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """share of the images to put into split "val" instead"""
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    """images per tar; 1000 of ImageNet are about 110 MB"""
    labels: Path | None = None
    """table of the images' classes: a CSV file with columns such as file_name and label, or Tiny
    ImageNet's val_annotations.txt"""
    unlabelled: bool = False
    """folders are no classes: write none"""
    seed: Seed = 0
    """seed of the shuffle"""
    encoding: Encoding = field(default_factory=Encoding)
    download_to: str | None = None
    """folder for the downloads of torchvision"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and self.unlabelled:
            raise UserError("--labels and --unlabelled contradict each other")
        if self.holdout and self.split == "val":
            raise UserError('--holdout writes split "val": give this one another --split')
        # Shards are found by <split>-*.tar, and DALI must be able to read their names.
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.split):
            raise UserError(f"--split {self.split!r}: use letters, digits, _, . and - only")


@dataclass(frozen=True)
class PrecomputeFreq(Checked):
    """Shards to score, and the cache for the scores."""

    shards: list[str]
    """tars, folders of tars, or patterns with wildcards or braces (in quotes)"""
    cache: str
    """folder or object-store URL of the score cache; created if missing"""
    spec: ScoreSpec = field(default_factory=ScoreSpec)
    watch: str | None = None
    """run for ever: look for new and changed shards again after this time (30s, 10m, 2h). Training
    runs that start later use them"""
    workers: Annotated[int | None, Ge(1)] = None
    """parallel tasks; one per CPU of the cluster if left out"""
    max_bad: Annotated[float, Ge(0), Le(1)] = 0.01
    """fail if a larger share of the images is quarantined"""
    max_damaged: Annotated[int, Ge(0)] = 0
    """fail if more tars are cut off or broken"""
    retry_bad: bool = False
    """judge all images of these shards again, quarantined ones too. If a verdict changes, the shard
    gets new rows: other scores of it must be computed again, and runs on it cannot resume"""
    summary: str | None = None
    """file for a copy of the JSON summary"""
    json: bool = False
    """print the summary as one JSON line"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch is not None:
            seconds(self.watch)
            if self.retry_bad:
                raise UserError(
                    "--retry-bad and --watch contradict each other: it judges all shards anew"
                )


def seconds(duration: str) -> float:
    """Seconds of a duration such as 30s, 10m or 2h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", duration)
    if match is None:
        raise UserError(f"--watch {duration}: give a time such as 30s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


@dataclass(frozen=True)
class RefreshScores(RefreshWorkers, Checked):
    """Encoder, and images to score with it."""

    checkpoint: Path | None = None
    """checkpoint, run folder (its latest checkpoint), or an encoder in a run's refresh folder"""
    follow: Path | None = None
    """run folder: refresh with each encoder that the run leaves, until it is finished"""
    init: str | None = None
    """any other encoder, as for --init of `famt pretrain`. A run that pins the maps is guided by a
    trained model from its first step on"""
    out: Path | None = None
    """folder for the maps of a --checkpoint or an --init"""
    image_size: Annotated[int | None, Ge(1)] = None
    """image size for an --init, px, if not its own. The number of patches must be that of the crops
    of the run that will pin the maps"""
    shards: list[str] | None = None
    """tars to score; those of the run if left out"""
    cache: str | None = None
    """score cache; that of the run if left out"""
    kinds: list[str] | None = None
    """scores to compute: token_frequency, attention, cls_attention, frequency_attention (product of
    the first two, the paper's weight), or kinds of installed packages; those that the run uses if
    left out"""
    precision: Literal["bf16", "fp32"] | None = None
    """bf16: under autocast; that of the run if left out"""
    json: bool = False
    """print the summary of each refresh as one JSON line"""


@dataclass(frozen=True)
class Results(Checked):
    """Grid to run, and resources of each run."""

    grid: Annotated[Path, tyro.conf.Positional]
    """TOML file of a grid, or the .json.gz of a published one"""
    out: Path | None = None
    """folder for runs, table and page; that of the file if left out"""
    plot: Path | None = None
    """picture, .svg or .png, of the linear probes against the cost of a run"""
    minutes: Annotated[float | None, Ge(0)] = None
    """stop after this time; the same command resumes"""
    cpus: Annotated[int, Ge(1)] = 1
    """CPU cores per run; for small models, many runs of one core are fastest"""
    gpus: Annotated[float, Ge(0)] = 0
    """GPUs per run, all on one machine; 0.25 lets four small runs share one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot and self.plot.suffix not in (".svg", ".png"):
            raise UserError(f"--plot {self.plot}: the name must end in .svg or .png")


@dataclass(frozen=True)
class Demo(Checked):
    """Data and length of the demo."""

    data: str = "digits"
    """folder of images or of class folders; scikit-learn's digits if left out"""
    out: Path = Path("demo")
    """folder for results; each demo makes a new folder in it"""
    images_seen: Annotated[int, Ge(1)] = 120_000
    """length of the training: epochs x images of the training set"""
