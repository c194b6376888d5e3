"""Refresh scores on Ray: actors, their resources, and how shards are shared among them."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import obstore.exceptions
import ray
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from famt.jobs.cluster import failure
from famt.jobs.options import RefreshWorkers
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable, load_samples
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.scoring.model_scores import score_images
from famt.train.signals.refresh_folder import Encoder

GPU_SHARE = 0.25
"""share of a GPU that an actor takes beside a training"""
_MOST_CPUS = 4

_POLL = 2.0  # seconds
_NICE = 19
_PATIENCE = 60.0  # seconds for actors to start
_SHARDS_A_TASK = 16  # few, so that DALI graphs are few; more would cost more with a lost worker
_TRIES = 3  # of a task whose worker was lost

Maps = dict[ModelScoreSpec, NDArray[np.float16]]
"""`[R, G, G]` for each score"""


class UnwantedError(Exception):
    """No run wants the generation any more."""


@dataclass(frozen=True)
class Place:
    """Resources of an actor, and its niceness."""

    cpus: int
    gpus: float
    nice: int = 0

    @classmethod
    def of(cls, workers: RefreshWorkers, device: str | None, cluster: dict[str, float]) -> Place:
        """Place for each actor.

        Args:
            device: device of the training.
            cluster: total resources, as Ray counts them.

        Raises:
            UserError: the cluster is too small for one actor.
        """
        gpus = workers.gpus_per_worker
        if gpus is None:
            gpus = GPU_SHARE if device == "cuda" and cluster.get("GPU") else 0.0
        # Half of a GPU's cores at most: the other half decodes for the training.
        of_a_gpu = cluster.get("CPU", 0) / cluster["GPU"] if cluster.get("GPU") else 0
        beside = min(int(of_a_gpu / 2), _MOST_CPUS) if gpus >= 1 else 1
        place = cls(workers.cpus_per_worker or max(1, beside), gpus)
        if not place.room(cluster):
            raise UserError(
                f"the cluster is too small for a worker of {place.cpus} CPUs and {gpus:g} GPUs; "
                "lower --cpus-per-worker or --gpus-per-worker"
            )
        return place

    def room(self, resources: dict[str, float]) -> int:
        """Number of actors that fit."""
        cpus = resources.get("CPU", 0) // self.cpus
        return int(min(cpus, resources.get("GPU", 0) // self.gpus) if self.gpus else cpus)


_LAST_RESORT = Place(0, 0.0, _NICE)


# No restarts: an actor that waits for room would keep its shards waiting.
@ray.remote(max_restarts=0, max_task_retries=3)
class _Refresher:
    def __init__(
        self,
        encoder: Encoder,
        cache: ScoreCache,
        specs: list[ModelScoreSpec],
        threads: int,
        place: Place,
    ) -> None:
        os.nice(place.nice)
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if place.gpus else "cpu")
        self._encoder = encoder.build().to(self._device)
        self._cache, self._specs, self._threads = cache, specs, threads

    def ready(self) -> None:
        """Return once the actor is up."""

    @ray.method(retry_exceptions=[OSError, obstore.exceptions.GenericError])
    def refresh(self, urls: list[str], shard_ids: list[str], batch_size: int) -> Maps:
        """Maps of some tars, whose contents must match the ids."""
        samples = load_samples(urls, self._cache)
        if samples.shard_ids != shard_ids:
            raise UserError("the tars changed meanwhile; try again")
        return score_images(
            self._encoder,
            samples,
            self._specs,
            batch_size=batch_size,
            threads=self._threads,
            device=self._device,
        )


def refresh_on_ray(
    samples: SampleTable,
    encoder: Encoder,
    cache: ScoreCache,
    specs: list[ModelScoreSpec],
    workers: RefreshWorkers,
    over: Callable[[], bool],
) -> Iterator[tuple[range, Maps | str]]:
    """Score images on actors, each taking one part of the shards after another.

    Only running actors get parts. The part of a lost actor goes to another, and a new actor starts
    when there is room. If none can start, or none does within a minute, one low-priority actor on
    CPUs does all the work.

    Args:
        over: whether the maps are no longer wanted; polled every few seconds.

    Yields:
        range of shard numbers, and the maps of their rows or the reason of a failure.

    Raises:
        UnwantedError: `over` returned True.
        UserError: the cluster is too small for one actor.
    """
    place = Place.of(workers, encoder.config.get("device"), ray.cluster_resources())
    free = place.room(ray.available_resources())
    shards = len(samples.urls)
    count = min(workers.workers or max(1, free), shards)
    size = max(1, min(_SHARDS_A_TASK, shards // (4 * count)))
    parts = (range(shards)[first : first + size] for first in range(0, shards, size))
    waiting = deque(part for part in parts if sum(samples.counts[part.start : part.stop]))
    state = ray.put(encoder)
    # Part of each actor; None while it starts.
    busy: dict[ray.ObjectRef, tuple[Any, Place, range | None]] = {}
    losses: Counter[range | None] = Counter()
    reason, alone = "", False

    def start(place: Place) -> None:
        actor = _Refresher.options(num_cpus=place.cpus, num_gpus=place.gpus).remote(  # type: ignore[attr-defined]
            state, cache, specs, workers.cpus_per_worker or max(1, place.cpus), place
        )
        busy[actor.ready.remote()] = actor, place, None

    for _ in range(count if free else 0):
        start(place)
    patient_until = time.monotonic() + _PATIENCE
    while waiting or any(part for _, _, part in busy.values()):
        if any(part for _, _, part in busy.values()):
            patient_until = time.monotonic() + _PATIENCE
        elif alone and not busy:
            yield from ((part, reason) for part in waiting)
            return
        elif not alone and (not busy or time.monotonic() > patient_until):
            tqdm.write(
                "no actor started in time; going on with one low-priority actor on CPUs", sys.stderr
            )
            start(_LAST_RESORT)
            alone = True
        if over():
            raise UnwantedError
        done, _ = ray.wait([*busy], timeout=_POLL)
        for each in done:
            actor, its, part = busy.pop(each)
            try:
                outcome = ray.get(each)
            except ray.exceptions.RayTaskError as error:
                outcome = failure(error)
            except ray.exceptions.RayError as error:  # the actor is gone
                reason = str(error)
                losses[part] += 1
                broken = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
                if part or not (broken or losses[None] > _TRIES * count):
                    start(its)
                if part and losses[part] < _TRIES:
                    waiting.append(part)
                elif part:
                    yield part, reason
                continue
            if part:
                yield part, outcome
            if waiting:  # else Ray ends the actor, as nothing refers to it any more
                new = waiting.popleft()
                urls, ids = (of[new.start : new.stop] for of in (samples.urls, samples.shard_ids))
                busy[actor.refresh.remote(urls, ids, workers.batch_size)] = actor, its, new
