"""Scores of whole images by the model in training, recomputed as it learns."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.loading.masking import crop_scores
from famt.pipeline.scores import check_model_kinds
from famt.pipeline.scoring.generation import GenerationError, generations, open_generation, step_of
from famt.pipeline.wording import counted
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint
from famt.train.config import Pretrain
from famt.train.distributed import SEEN_WITHIN, Ranks
from famt.train.log import Log
from famt.train.signals.refresh_folder import Encoder, Epochs, RefreshFolder
from famt.train.stop import Stop

_POLL = 0.2  # seconds
_PATIENCE = 60.0  # seconds that a job may take to start


class RefreshedMaps:
    """Maps of the generation in use, replaced as a whole by a newer one between epochs.

    The run and the job exchange encoders and generations through a folder; see
    `famt.train.signals.refresh_folder`. All ranks call the same methods; those of a machine share
    the maps.

    Args:
        ended: the run has done its last step, and needs no job.

    Attributes:
        current: step of the generation in use; None before the first.
        grid: cells a side of the maps.

    Raises:
        UserError: no such kind of score, or a run that waits for a refresh job sees none.
        GenerationError: the one to use is missing, damaged or of other images.
    """

    def __init__(
        self,
        run: str,
        config: Pretrain,
        samples: SampleTable,
        encoder: VisionTransformer,
        ranks: Ranks,
        *,
        ended: bool = False,
    ) -> None:
        self._run, self._config, self._samples = run, config, samples
        self._encoder, self._ranks, self._kinds = encoder, ranks, config.refreshed_kinds
        check_model_kinds(self._kinds)
        self.current: int | None = None
        self.grid = config.sizes.grid
        shape = (len(samples), self.grid, self.grid)
        self._maps = {
            kind: ranks.share(lambda: torch.ones(shape, dtype=torch.float16))
            for kind in self._kinds
        }
        self._leads = ranks.leads()
        self._folder = RefreshFolder(config.out)
        self._begun = -1
        self._pinned = config.refresh.pin
        if self._pinned:
            self._load(self._pinned)
            return
        self._epochs: Epochs = ranks.from_main(lambda: Epochs(self._folder, run))
        if ranks.is_main and not ended:
            self._folder.finished.unlink(missing_ok=True)
            if self._epochs.new:  # an earlier run wrote no checkpoint; remove what it left
                self._folder.remove_encoders()
                for path in generations(self._folder.path):
                    path.unlink()
        self._job = f"famt refresh --follow {config.out}"
        self._is_followed = not ended and ranks.from_main(self._find_job)

    def read(self, kind: str, crops: CropBatch) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float32 on their device; None before a generation."""
        return None if self.current is None else crop_scores(self._maps[kind], crops, self.grid)

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        """Write the encoder if a generation is due, and take up a new generation.

        Returns:
            False if the run was asked to stop while it waited for a generation.

        Raises:
            OSError: the encoder can't be written, or the generation waited for was not made.
            GenerationError: one that a resumed run must take up again is missing or damaged.
        """
        if self._begun == epoch or self._pinned:
            return True
        due = epoch in self._config.refreshes
        known, wanted = self._ranks.from_main(lambda: self._epochs.at(epoch))
        if due:
            self._ranks.from_main(lambda: self._write_encoder(epoch, step, log))
        if known:  # the run has begun this epoch before
            self._take_up(wanted, epoch, step, log)
        elif not self._take_up_newest(due, epoch, step, stop, log):
            return False
        self._begun = epoch
        self._ranks.from_main(lambda: self._record(epoch, step))
        if log:
            self._report_job(step, log)
            for each in self._folder.encoders():
                if reason := self._folder.why_failed(each):
                    self._folder.failure(each).unlink(missing_ok=True)
                    log.event(step, "refresh failed", tell=True, reason=reason)
        return True

    def restore(self, step: int) -> None:
        """Go back to the generation in a checkpoint.

        Raises:
            GenerationError: it is missing or damaged.
        """
        if not self._pinned and self.current != step:
            self._load(self._folder.generation(step), self._run)

    def restart(self, epoch: int) -> None:
        """Start an epoch with the newest generation, whatever the run took up before."""
        if not self._pinned and self._ranks.is_main:
            self._epochs.forget_from(epoch)
            self._folder.remove_encoders()

    def saved(self) -> None:
        """Remove generations that only deleted checkpoints needed."""
        if not self._pinned and self._ranks.is_main:
            self._remove_replaced()

    def describe(self) -> str:
        """Origin of the maps, for the run's plan."""
        if self._pinned:
            return f"from {self._pinned}"
        due = self._config.refreshes
        if not due:
            return "none of which is due in this run"
        alone = not self._is_followed
        every = "epoch" if due.step == 1 else f"{due.step} epochs"
        meanwhile = "waits for it" if self._config.refresh.wait else "goes on meanwhile"
        return (
            f"recomputed every {every}, {counted(len(due), 'time')}, by a job beside this run, "
            f"which {meanwhile}" + (f"; none does: start `{self._job}`" if alone else "")
        )

    def close(self, *, finished: bool) -> None:
        """Tell the job that no encoder will follow, if the run is finished, and print how many
        generations it used."""
        if not (finished and self._ranks.is_main) or self._folder.finished.exists():
            return
        self._folder.finish()
        if self._begun >= 0 and self._config.refreshes:  # else the run was finished before
            used, due = len(self._epochs.generations_since(0)), len(self._config.refreshes)
            late = "none was ready in time: train for more epochs, or give --refresh.wait"
            why = late if self._is_followed else "no job followed the run to its end"
            tqdm.write(
                f"new score maps used: {used} of {due}{'' if used else f'; {why}'}",
                file=sys.stderr,
            )

    def _find_job(self) -> bool:
        """Whether a job follows the run; one that the run needs may take a minute to start."""
        needed = self._config.refresh.wait and bool(self._config.refreshes)
        if needed and not self._folder.is_followed():
            print(f"waiting for a refresh job: start `{self._job}`", file=sys.stderr, flush=True)
        until = time.monotonic() + _PATIENCE
        while needed and not self._folder.is_followed():
            if time.monotonic() > until:
                raise UserError(
                    f"--refresh.wait: no refresh job follows {self._config.out}. `famt pretrain` "
                    f"starts one; otherwise start `{self._job}` first"
                )
            time.sleep(_POLL)
        return self._folder.is_followed()

    def _report_job(self, step: int, log: Log) -> None:
        """Log, once, that the job ended."""
        if self._is_followed and not self._folder.is_followed():
            self._is_followed = False
            log.event(step, "refresh job ended", tell=True, start=self._job)

    def _await(self, step: int, stop: Stop, log: Log | None) -> bool:
        """Wait for the generation of a step; False if any rank is asked to stop instead."""
        while True:
            is_there = self._folder.generation(step).exists()
            why_not = "" if is_there else self._folder.why_failed(step)
            seen = self._ranks.gather((is_there, why_not, stop.asked))
            is_there, why_not, _ = seen[0]  # as the main rank sees it
            if why_not:
                raise OSError(f"the generation of step {step} could not be made: {why_not}")
            if any(asked for *_, asked in seen):
                return False
            if is_there:
                return True
            if log:
                self._report_job(step, log)
            time.sleep(_POLL)

    def _take_up_newest(
        self, due: bool, epoch: int, step: int, stop: Stop, log: Log | None
    ) -> bool:
        """Take up the newest generation, or the one that is due if the run waits for it; False if
        asked to stop meanwhile."""
        while True:
            if due and self._config.refresh.wait:
                if not self._await(step, stop, log):
                    return False
                wanted: int | None = step
            else:
                made = self._ranks.from_main(lambda: generations(self._folder.path))
                wanted = step_of(made[-1]) if made else None
            try:
                self._take_up(wanted, epoch, step, log)
                return True
            except GenerationError as error:  # remove it, and the job makes another
                if self._ranks.is_main and wanted is not None:
                    self._folder.generation(wanted).unlink(missing_ok=True)
                if log:
                    log.event(step, "generation removed", tell=True, reason=storage.reason(error))

    def _take_up(self, wanted: int | None, epoch: int, step: int, log: Log | None) -> None:
        """Take up the generation of a step, unless it is in use."""
        if wanted in (None, self.current):
            return
        started = time.perf_counter()
        self._load(self._folder.generation(wanted), self._run)
        if log:
            log.event(
                step,
                "generation",
                epoch=epoch,
                generation=wanted,
                kinds=self._kinds,
                age_steps=step - wanted,
                pause_ms=1000 * (time.perf_counter() - started),
            )
            told = f"step {step}: new score maps in use, by the encoder of step {wanted}"
            tqdm.write(told, file=sys.stderr)

    def _load(self, path: Path, run: str | None = None) -> None:
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
                maps = generation.maps(self._samples, self._kinds, self.grid)
            except (GenerationError, OSError) as error:
                problem = error
        for each in self._ranks.gather(problem):
            if each:
                raise each
        for kind, new in maps.items():
            self._maps[kind].copy_(new)
        self._ranks.gather(None)  # nobody reads before all have written
        self.current = step_of(path)

    def _record(self, epoch: int, step: int) -> None:
        self._epochs.write(epoch, step, self.current)
        if self.current is not None:
            self._folder.remove_encoders(self.current)
        self._remove_replaced()

    def _remove_replaced(self) -> None:
        """Remove generations before the present one that no checkpoint would take up again."""
        steps = checkpoint.steps(self._config.out)
        needed = self._epochs.generations_since(steps[0] if steps else 0)
        for path in generations(self._folder.path):
            step = step_of(path)
            if self.current is not None and step < self.current and step not in needed:
                path.unlink(missing_ok=True)

    def _write_encoder(self, epoch: int, step: int, log: Log | None) -> None:
        path = self._folder.encoder(step)
        self._folder.failure(step).unlink(missing_ok=True)
        if path.exists():
            return
        encoder = Encoder(
            run=self._run,
            step=step,
            sizes=dataclasses.asdict(self._config.sizes),
            weights=self._encoder.state_dict(),
            config={**self._config.describe(), "device": self._ranks.device.type},
            kinds=self._kinds,
            urls=self._samples.urls,
        )
        self._folder.save(encoder)
        if log:
            log.event(step, "refresh due", encoder=path)
            due = self._config.refreshes
            told = f"step {step}: new score maps requested, {due.index(epoch) + 1} of {len(due)}"
            if epoch != due.start and not generations(self._folder.path):
                told += "; none is ready so far (--refresh.wait waits for each)"
            tqdm.write(told, file=sys.stderr)


def lost_generations(resumed: Checkpoint, config: Pretrain, samples: SampleTable) -> list[Path]:
    """Generations that an exact resume of a checkpoint needs but that can't be read."""
    if not config.refreshed_kinds or config.refresh.pin:
        return []
    folder, lost = RefreshFolder(config.out), []
    needed = Epochs(folder, resumed.run).generations_since(resumed.step)
    states = (state.get("generation") for state in resumed.components.values())
    needed |= {step for step in states if step is not None}
    for path in map(folder.generation, sorted(needed)):
        try:
            open_generation(path).maps(samples, config.refreshed_kinds, config.sizes.grid)
        except GenerationError:
            lost.append(path)
    return lost
