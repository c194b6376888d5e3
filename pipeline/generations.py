"""Generations: whole-image maps that a model in training gave, as training takes them up.

    <cache>/generations/<run>/<step>.json       a generation, put when all its shards have maps
    <cache>/generations/<run>/needed-by-<user>  steps that a run or its checkpoints work with

The maps themselves lie in the shards' entries, under an id that holds the hash of the encoder's
weights: generations of two runs can't be mixed up, and one that is computed again is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import obstore
from obstore.store import ObjectStore

from pipeline import storage
from pipeline.manifest import FORMAT, CacheError, check_format
from pipeline.scores import ModelScoreSpec

_ROOT = "generations"
_NEEDED = "needed-by-"


@dataclass(frozen=True)
class Generation:
    """Maps of all images of a data set from one encoder.

    Attributes:
        run: id of the training run.
        step: optimiser steps that the encoder had done.
        spec: what was computed.
        data: `SampleTable.digest` of the shards.
        images: how many were scored.
    """

    run: str
    step: int
    spec: ModelScoreSpec
    data: str
    images: int


class Generations:
    """The generations of all runs in the cache in `store`; `url` names it in errors."""

    def __init__(self, store: ObjectStore, url: str) -> None:
        self._store, self._url = store, url

    def publish(self, generation: Generation) -> None:
        """Make a generation known, whose maps are all in the cache."""
        text = json.dumps({"format": FORMAT, **asdict(generation)}).encode()
        storage.put(self._store, f"{_ROOT}/{generation.run}/{generation.step:08d}.json", text)

    def of(self, run: str) -> list[Generation]:
        """The generations of a run, oldest first."""
        found = []
        for part in obstore.list(self._store, f"{_ROOT}/{run}"):
            for meta in part:
                if meta["path"].endswith(".json"):
                    content = self._read(meta["path"])
                    if content is not None:
                        found.append(_generation(content))
        return sorted(found, key=lambda generation: generation.step)

    def runs(self) -> list[str]:
        """Ids of the runs that have generations here."""
        paths = (meta["path"] for part in obstore.list(self._store, _ROOT) for meta in part)
        return sorted({path.split("/")[1] for path in paths})

    def need(self, run: str, steps: Iterable[int], *, by: str) -> None:
        """Say which generations of a run must stay for the run `by`, which may be the same."""
        content = {"format": FORMAT, "steps": sorted(set(steps))}
        storage.put(self._store, f"{_ROOT}/{run}/{_NEEDED}{by}", json.dumps(content).encode())

    def superseded(self, run: str) -> list[Generation]:
        """Generations of a run that nothing needs: neither the newest nor said to be needed."""
        needed = set()
        for part in obstore.list(self._store, f"{_ROOT}/{run}"):
            for meta in part:
                if _NEEDED in meta["path"]:
                    needed |= set((self._read(meta["path"]) or {"steps": []})["steps"])
        return [each for each in self.of(run)[:-1] if each.step not in needed]

    def drop(self, run: str) -> None:
        """Make all generations of a run unknown, and what is said to need them."""
        for part in obstore.list(self._store, f"{_ROOT}/{run}"):
            obstore.delete(self._store, [meta["path"] for meta in part])

    def forget(self, generation: Generation) -> None:
        """Make a generation unknown; its maps are then nobody's."""
        obstore.delete(self._store, f"{_ROOT}/{generation.run}/{generation.step:08d}.json")

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(bytes(obstore.get(self._store, path).bytes()))
        except FileNotFoundError:  # collected meanwhile, or never there
            return None
        except ValueError:
            raise CacheError(f"{path} in {self._url} is damaged; remove it") from None
        check_format(content.pop("format"), f"{path} in {self._url}")
        return content


def _generation(content: dict[str, Any]) -> Generation:
    spec = dict(content["spec"])
    return Generation(**{**content, "spec": ModelScoreSpec(**spec)})
