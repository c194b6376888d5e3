"""Score images on Ray: actors, what they use of the cluster, and how they share the shards."""

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
from famt.pipeline.cache import ScoreCache
from famt.pipeline.dataset import SampleTable, load_samples
from famt.pipeline.errors import UserError
from famt.pipeline.refresh import score_images
from famt.pipeline.scores import ModelScoreSpec
from famt.train.checkpoint import Encoder

GPU_SHARE = 0.25
"""of a GPU for an actor, beside a training that holds the rest of it"""

_POLL = 2.0  # seconds
_NICE = 19
_PATIENCE = 60.0  # seconds that actors may take to come up
_SHARDS_A_TASK = 16  # a task builds one DALI graph; what a lost worker did not finish is done again
_TRIES = 3  # of shards whose worker was lost

Maps = dict[ModelScoreSpec, NDArray[np.float16]]
"""of each score, `[R, G, G]`"""


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


# Ray restarts none of them: one that waits for room would keep the shards that it was given.
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
        """Returns when the actor is up."""

    @ray.method(retry_exceptions=[OSError, obstore.exceptions.GenericError])
    def refresh(self, urls: list[str], shard_ids: list[str], batch_size: int) -> Maps:
        """The maps of some tars, whose contents must be those of the ids."""
        samples = load_samples(urls, self._cache)
        if samples.shard_ids != shard_ids:
            raise UserError("the tars were changed meanwhile; try again")
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
    """Score images on actors that take part after part of the shards.

    Parts are handed only to actors that are up: what is free now may be taken before they come. A
    lost actor's part goes to another one, and a new one comes when there is room for it. Where
    none can, or none comes up within a minute, one actor on CPUs, of low priority, does all.

    Args:
        over: whether nobody wants the maps any more; asked every few seconds.

    Yields:
        numbers of shards and the maps of their rows, or why there are none, as actors finish them.

    Raises:
        UnwantedError: it is over.
        UserError: the whole cluster has no room for one actor.
    """
    place = Place.of(workers, encoder.config.get("device"), ray.cluster_resources())
    free = place.room(ray.available_resources())
    shards = len(samples.urls)
    count = min(workers.workers or max(1, free), shards)
    size = max(1, min(_SHARDS_A_TASK, shards // (4 * count)))
    parts = (range(shards)[first : first + size] for first in range(0, shards, size))
    waiting = deque(part for part in parts if sum(samples.counts[part.start : part.stop]))
    state = ray.put(encoder)
    # What each actor does: a part, or None while it comes up.
    busy: dict[ray.ObjectRef, tuple[Any, Place, range | None]] = {}
    idle: list[tuple[Any, Place]] = []
    losses: Counter[range | None] = Counter()
    reason, alone = "", False

    def start(place: Place) -> None:
        actor = _Refresher.options(num_cpus=place.cpus, num_gpus=place.gpus).remote(  # type: ignore[attr-defined]
            state, cache, specs, workers.cpus_per_worker, place
        )
        busy[actor.ready.remote()] = actor, place, None

    for _ in range(count if free else 0):
        start(place)
    patient_until = time.monotonic() + _PATIENCE
    while waiting or any(part for _, _, part in busy.values()):
        while idle and waiting:
            (actor, its), new = idle.pop(), waiting.popleft()
            urls, ids = (each[new.start : new.stop] for each in (samples.urls, samples.shard_ids))
            busy[actor.refresh.remote(urls, ids, workers.batch_size)] = actor, its, new
        if any(part for _, _, part in busy.values()):
            patient_until = time.monotonic() + _PATIENCE
        elif alone and not busy:
            yield from ((part, reason) for part in waiting)
            return
        elif not alone and (not busy or time.monotonic() > patient_until):
            tqdm.write("no actor came up: one actor on CPUs at low priority", sys.stderr)
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
                for other, place_of_other in idle:  # may be lost with it
                    busy[other.ready.remote()] = other, place_of_other, None
                idle.clear()
                broken = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
                if part or not (broken or losses[None] > _TRIES * count):
                    start(its)
                if part and losses[part] < _TRIES:
                    waiting.append(part)
                elif part:
                    yield part, reason
                continue
            idle.append((actor, its))
            if part:
                yield part, outcome
