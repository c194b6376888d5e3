"""The options of the programs that run on Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from famt.pipeline.options import MAIN
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
