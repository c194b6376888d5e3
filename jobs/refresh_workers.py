"""The actors of a refresh: what they use of the cluster, and how tars are handed to them."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import obstore.exceptions
import ray
import torch
from tqdm import tqdm

from famt.jobs.cluster import failure
from famt.jobs.options import RefreshWorkers
from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import UserError
from famt.pipeline.refresh import refresh_shards
from famt.pipeline.scores import ModelScoreSpec
from famt.train.checkpoint import Encoder

GPU_SHARE = 0.25
"""of a GPU for an actor, beside a training that holds the rest of it"""

_POLL = 2.0  # seconds
_NICE = 19
_PATIENCE = 60.0  # seconds that actors may take to come up
_SHARDS_A_TASK = 16  # a task builds one DALI graph; what a lost worker did not finish is done again
_TRIES = 3  # of tars whose worker was lost


class UnwantedError(Exception):
    """Nobody will take up the generation that is being made."""


@dataclass(frozen=True)
class Place:
    """What an actor holds of the cluster, and its priority."""

    cpus: int
    gpus: float
    nice: int = 0

    @classmethod
    def of(cls, workers: RefreshWorkers, device: str | None, cluster: dict[str, float]) -> Place:
        """The place of each actor.

        Args:
            device: that the run trains on.
            cluster: resources of the whole of it, as Ray counts them.

        Raises:
            ValueError: the whole cluster would not have room for one.
        """
        gpus = workers.gpus_per_worker
        if gpus is None:
            gpus = GPU_SHARE if device == "cuda" and cluster.get("GPU") else 0.0
        place = cls(workers.cpus_per_worker, gpus)
        if not place.room(cluster):
            raise UserError(
                f"the cluster has no room for one worker of {place.cpus} CPUs and {gpus:g} GPUs; "
                "lower --cpus-per-worker or --gpus-per-worker"
            )
        return place

    def room(self, resources: dict[str, float]) -> int:
        """How many of these there is room for."""
        cpus = resources.get("CPU", 0) // self.cpus
        return int(min(cpus, resources.get("GPU", 0) // self.gpus) if self.gpus else cpus)


_LAST_RESORT = Place(0, 0.0, _NICE)


# Ray restarts none of them: one that waits for room would keep the tars that it was given.
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

    def ready(self) -> bool:
        """Answers when the actor is up."""
        return True

    @ray.method(retry_exceptions=[OSError, obstore.exceptions.GenericError])
    def refresh(self, urls: list[str], batch_size: int) -> int:
        """Put the maps of some tars into the cache; returns how many tars."""
        done = refresh_shards(
            self._encoder,
            urls,
            self._cache,
            self._specs,
            batch_size=batch_size,
            threads=self._threads,
            device=self._device,
        )
        return sum(1 for _ in done)


def refresh_on_ray(
    urls: list[str],
    encoder: Encoder,
    cache: ScoreCache,
    specs: list[ModelScoreSpec],
    workers: RefreshWorkers,
    over: Callable[[], bool],
) -> Iterator[tuple[list[str], int | str]]:
    """Put the maps of tars into the cache, on actors that take part after part.

    Parts are handed only to actors that are up: what is free now may be taken before they come. A
    lost actor's part goes to another one, and a new one comes when there is room for it. Where
    nobody comes up within a minute, one actor on CPUs, of low priority, does all.

    Args:
        over: whether nobody wants the maps any more; asked every few seconds.

    Yields:
        tars and how many were done, or why they were not, as the actors finish them.

    Raises:
        UnwantedError: it is over.
        ValueError: the whole cluster has no room for one actor.
        CacheFullError: no room is left in the cache.
    """
    place = Place.of(workers, encoder.config.get("device"), ray.cluster_resources())
    free = place.room(ray.available_resources())
    count = min(workers.workers or max(1, free), len(urls))
    size = max(1, min(_SHARDS_A_TASK, len(urls) // (4 * count)))
    waiting = deque(urls[first : first + size] for first in range(0, len(urls), size))
    state = ray.put(encoder)
    coming: dict[ray.ObjectRef, tuple[Any, Place]] = {}
    idle: list[tuple[Any, Place]] = []
    running: dict[ray.ObjectRef, tuple[tuple[Any, Place], list[str]]] = {}
    tries: Counter[str] = Counter()  # of a part, by its first tar
    lost_coming, reason = 0, ""

    def start(place: Place) -> None:
        actor = _Refresher.options(num_cpus=place.cpus, num_gpus=place.gpus).remote(  # type: ignore[attr-defined]
            state, cache, specs, workers.cpus_per_worker, place
        )
        coming[actor.ready.remote()] = actor, place

    for _ in range(count if free else 0):
        start(place)
    patient_until = time.monotonic() + _PATIENCE if free else 0.0
    while waiting or running:
        while idle and waiting:
            worker, part = idle.pop(), waiting.popleft()
            running[worker[0].refresh.remote(part, workers.batch_size)] = worker, part
        if running:
            patient_until = max(patient_until, time.monotonic() + _PATIENCE)
        elif not coming and patient_until == math.inf:
            yield from ((part, reason) for part in waiting)
            return
        elif time.monotonic() > patient_until:
            tqdm.write("no actor came up: one actor on CPUs at low priority", sys.stderr)
            start(_LAST_RESORT)
            patient_until = math.inf
        if over():
            raise UnwantedError
        ready, _ = ray.wait([*running, *coming], timeout=_POLL) if running or coming else ([], [])
        if not ready:
            continue
        (found,) = ready
        worker, part = (coming.pop(found), []) if found in coming else running.pop(found)
        outcome = _outcome(found)
        if not isinstance(outcome, _Lost):
            idle.append(worker)
            if part:
                yield part, outcome
            continue
        coming |= {each[0].ready.remote(): each for each in idle}  # may be lost with it
        idle.clear()
        if part:
            start(worker[1])
            tries[part[0]] += 1
            if tries[part[0]] < _TRIES:
                waiting.append(part)
            else:
                yield part, outcome.reason
        elif not outcome.for_good and lost_coming < _TRIES * count:
            lost_coming += 1
            start(worker[1])
        else:
            reason = outcome.reason


class _Lost(NamedTuple):
    """An actor that is gone, or never came up."""

    reason: str
    for_good: bool
    """its set-up raised, as that of another one would"""


def _outcome(done: ray.ObjectRef) -> Any | str | _Lost:
    """What an actor's method returned, or why it failed."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        return failure(error)
    except ray.exceptions.RayError as error:
        died = isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed
        return _Lost(str(error), not died)
