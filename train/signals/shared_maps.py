"""The maps of a generation, in memory shared by the ranks of a machine."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.loading.masking import crop_scores
from famt.pipeline.scores import check_model_kinds
from famt.pipeline.scoring.generation import GenerationError, open_generation, step_of
from famt.train.distributed import SEEN_WITHIN, Ranks

_POLL = 0.2  # seconds


class SharedMaps:
    """Score maps of all images, replaced as a whole. All ranks call the same methods.

    Args:
        samples: the images.
        kinds: of the scores.
        grid: cells per side of the maps.
        ranks: this rank among those of the run; the first one of each machine reads files.

    Attributes:
        step: of the generation in use; None before the first.
    """

    def __init__(self, samples: SampleTable, kinds: list[str], grid: int, ranks: Ranks) -> None:
        check_model_kinds(kinds)
        self.step: int | None = None
        self._samples, self._grid, self._ranks = samples, grid, ranks
        shape = (len(samples), grid, grid)
        self._maps = {
            kind: ranks.share(lambda: torch.ones(shape, dtype=torch.float16)) for kind in kinds
        }
        self._leads = ranks.leads()

    def read(self, kind: str, crops: CropBatch) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float32 on their device; None before a generation."""
        if self.step is None:
            return None
        return crop_scores(self._maps[kind], crops, self._grid)

    def take_up(self, path: Path, run: str | None = None) -> None:
        """Replace the maps by those of a generation.

        Args:
            path: its file.
            run: id that it must have; None takes any.

        Raises:
            GenerationError, OSError: a machine can't read it; on all ranks, and the maps stay.
        """
        maps, problem = {}, None
        if self._leads:
            until = time.monotonic() + (0 if self._ranks.is_main else SEEN_WITHIN)
            while not path.exists() and time.monotonic() < until:
                time.sleep(_POLL)
            try:
                generation = open_generation(path)
                if run not in (None, generation.run):
                    raise GenerationError(f"{path} is of {generation.run}, not of {run}; remove it")
                maps = generation.maps(self._samples, list(self._maps), self._grid)
            except (GenerationError, OSError) as error:
                problem = error
        for each in self._ranks.gather(problem):
            if each:
                raise each
        for kind, new in maps.items():
            self._maps[kind].copy_(new)
        self._ranks.gather(None)  # nobody reads before all have written
        self.step = step_of(path)
