"""Generations: whole-image maps that a model in training gave, as training takes them up.

    <cache>/generations/<run>/<step>.json       a generation, put when all its shards have maps
    <cache>/generations/<run>/needed-by-<user>  steps that a run or its checkpoints work with

The maps themselves lie in the shards' entries, under an id that holds the hash of the encoder's
weights: generations of two runs can't be mixed up, and one that is computed again is the same.

The life of a generation, from the training's side in `famt.train.signals.following`, from the
job's in `famt.jobs.refresh_scores`:

1. *Due.* When an epoch begins, the run leaves its encoder in `<out>/refresh`, with the tars and the
   kinds of scores that it wants.
2. *Made.* The job that follows the folder puts maps of tar after tar, and then publishes the
   generation. If it can't, it says why beside the encoder, and tries again.
3. *Read.* A thread of the training, on each machine, reads the newest generation into RAM.
4. *Taken up.* When the next epoch begins, all ranks exchange their maps for it; which epoch began
   with which generation is written down, and repeated after a resume.
5. *Superseded.* A run needs the generation in use, the one that it reads, and those that it took
   up since its oldest checkpoint. The newest of all and those needed stay; the job has the others
   collected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from famt.pipeline.notices import Notices
from famt.pipeline.objects import Objects
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.sealed import damaged, seal, unseal

_ROOT = "generations"
_NEEDED = "needed-by-"
_REMEDY = "Remove it; runs that use that generation go on with the next one."


@dataclass(frozen=True)
class Generation:
    """Maps of all images of a data set from one encoder.

    Attributes:
        run: id of the training run.
        step: optimiser steps that the encoder had done.
        specs: what was computed, alike but for their kinds.
        data: `SampleTable.digest` of the shards.
        images: how many were scored.
    """

    run: str
    step: int
    specs: list[ModelScoreSpec]
    data: str
    images: int


class Generations:
    """The generations of all runs in the cache in `objects`."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._notices = objects, Notices(objects)

    def publish(self, generation: Generation) -> None:
        """Make a generation known, whose maps are all in the cache."""
        path = self.path(generation)
        self._objects.put(path, seal(asdict(generation), path))

    def of(self, run: str) -> list[Generation]:
        """The generations of a run, oldest first.

        Raises:
            CacheError: what is written of one is damaged.
        """
        found = []
        for stored in self._objects.below(f"{_ROOT}/{run}"):
            if stored.path.endswith(".json"):
                content = self._read(stored.path)
                if content is not None:
                    found.append(self._generation(content, stored.path))
        return sorted(found, key=lambda generation: generation.step)

    def runs(self) -> list[str]:
        """Ids of the runs that have generations here."""
        return sorted({stored.path.split("/")[1] for stored in self._objects.below(_ROOT)})

    def need(self, run: str, steps: Iterable[int], *, by: str) -> None:
        """Say which generations of a run must stay for the run `by`, which may be the same.

        After this nothing deletes them; one that was about to go is gone, and `of` does not list
        it any more.
        """
        needed, path = sorted(set(steps)), f"{_ROOT}/{run}/{_NEEDED}{by}"
        self._objects.put(path, seal({"steps": needed}, path))
        self._notices.wait({_path(run, step) for step in needed})

    def superseded(self, run: str, *, gone: Collection[str] = ()) -> list[Generation]:
        """Generations of a run that nothing needs: neither the newest nor said to be needed.

        Args:
            gone: runs that need nothing any more; if `run` is one of them, not even its newest.
        """
        needed = set()
        for path in self._needs(run):
            if path.partition(f"/{_NEEDED}")[2] not in gone:
                content = self._read(path) or {"steps": []}
                if not isinstance(content.get("steps"), list):
                    raise damaged(f"{self._objects.url}/{path}", "it names no steps", _REMEDY)
                needed |= set(content["steps"])
        known = self.of(run)
        kept = len(known) if run in gone else -1
        return [each for each in known[:kept] if each.step not in needed]

    def idle_needs(self, run: str, *, gone: Collection[str] = ()) -> list[str]:
        """Objects that say what runs need of `run`, of the runs that are gone."""
        return [path for path in self._needs(run) if path.partition(f"/{_NEEDED}")[2] in gone]

    def path(self, generation: Generation) -> str:
        """The object that makes a generation known."""
        return _path(generation.run, generation.step)

    def _needs(self, run: str) -> list[str]:
        return [each.path for each in self._objects.below(f"{_ROOT}/{run}") if _NEEDED in each.path]

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            data = self._objects.get(path)
        except FileNotFoundError:  # collected meanwhile, or never there
            return None
        return unseal(data, self._objects.url, path, _REMEDY)

    def _generation(self, content: dict[str, Any], path: str) -> Generation:
        try:
            specs = [ModelScoreSpec(**spec) for spec in content["specs"]]
            return Generation(**{**content, "specs": specs})
        except (TypeError, KeyError) as error:
            raise damaged(f"{self._objects.url}/{path}", error, _REMEDY) from None


def _path(run: str, step: int) -> str:
    return f"{_ROOT}/{run}/{step:08d}.json"
