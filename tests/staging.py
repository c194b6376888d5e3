"""A process that stages shards, to be killed: forked off one that has imported all it needs."""

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading import stage
from famt.pipeline.loading.dataset import SampleTable

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["famt.pipeline.loading.stage"])  # takes seconds to import


def start(samples: SampleTable, cache: ScoreCache, folder: Path) -> ForkServerProcess:
    """Begin to stage; returns when it is about to look what is there."""
    ranks, there = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_stage, args=(samples, cache, folder, there))
    process.start()
    assert ranks.poll(120)
    return process


def _stage(samples: SampleTable, cache: ScoreCache, folder: Path, begun: Connection) -> None:
    stage._CHUNK = 64 << 10  # so that a small tar too is fetched in pieces
    begun.send(None)
    stage.stage_shards(samples, cache, folder)
