"""Scores of whole images that the model in training gives, made anew as it learns."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.pipeline import storage
from famt.pipeline.dataset import SampleTable
from famt.pipeline.errors import UserError
from famt.pipeline.generation import GenerationError, generations, open_generation, step_of
from famt.pipeline.loader import CropBatch
from famt.pipeline.masking import crop_scores
from famt.pipeline.scores import check_model_kinds
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint, Encoder
from famt.train.config import Pretrain
from famt.train.distributed import Ranks
from famt.train.log import Log
from famt.train.signals.cached import Cached
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.signals.refresh_folder import Epochs, RefreshFolder
from famt.train.signals.signal import Context, Signal
from famt.train.streams import Stop

_POLL = 0.2  # seconds
_PATIENCE = 60.0  # seconds that a job may take to come up beside a run that needs it
_SEEN_WITHIN = 120.0  # seconds; NFS clients may keep an old listing for one minute


class RefreshedMaps:
    """Maps of the generation in use, exchanged for those of a newer one between two epochs.

    What a run and the job leave for each other: `famt.train.signals.refresh_folder`. All ranks of
    a machine share the maps, which its first rank reads; all call the same methods.

    Attributes:
        current: step of the generation in use, or None before the first.
        grid: cells a side of the maps.
    """

    def __init__(
        self,
        run: str,
        config: Pretrain,
        samples: SampleTable,
        encoder: VisionTransformer,
        ranks: Ranks,
    ) -> None:
        check_model_kinds(config.refreshed_kinds)
        self.current: int | None = None
        self.grid = config.sizes.grid
        self._run, self._config, self._samples = run, config, samples
        self._encoder, self._ranks, self._kinds = encoder, ranks, config.refreshed_kinds
        self._pinned = config.refresh.pin
        shape = (len(samples), self.grid, self.grid)
        self._maps = {
            kind: ranks.share(lambda: torch.ones(shape, dtype=torch.float16))
            for kind in self._kinds
        }
        self._leads = ranks.gather(ranks.node).index(ranks.node) == ranks.rank
        self._begun = -1
        self._folder = RefreshFolder(config.out)
        if self._pinned:
            self._take_up(self._pinned)
            return
        self._epochs: Epochs = ranks.from_main(lambda: Epochs(self._folder, run))
        if ranks.is_main:
            self._folder.finished.unlink(missing_ok=True)
            if self._epochs.new:  # what an earlier run left that wrote no checkpoint
                self._folder.remove_encoders()
                for path in generations(self._folder.path):
                    path.unlink()
        self._is_followed: bool = ranks.from_main(self._find_follower)

    def read(self, kind: str, crops: CropBatch) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float32 on their device; None before a generation."""
        if self.current is None:
            return None
        return crop_scores(self._maps[kind], crops, self.grid)

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        """Leave the encoder if a generation is due, and take up a new one.

        Returns:
            False if the run was asked to stop while it waited for a generation.

        Raises:
            OSError: the encoder can't be written, or what the run waits for was not made.
            GenerationError: one that a resumed run must take up again is missing or damaged.
        """
        if self._begun == epoch or self._pinned:
            return True
        due = epoch in self._config.refreshes
        known, wanted = self._ranks.from_main(lambda: self._epochs.at(epoch))
        if due:
            self._ranks.from_main(lambda: self._leave_encoder(step, log))
        while not known:  # what is damaged, or of an earlier run, is removed: the job makes another
            if due and self._config.refresh.wait:
                if not self._await(step, stop, log):
                    return False
                wanted = step
            else:
                wanted = self._ranks.from_main(self._newest)
            try:
                self._exchange(wanted, epoch, step, log)
                break
            except GenerationError as error:
                if self._ranks.is_main and wanted is not None:
                    self._folder.generation(wanted).unlink(missing_ok=True)
                if log:
                    log.event(step, "generation removed", tell=True, reason=storage.reason(error))
        else:
            self._exchange(wanted, epoch, step, log)
        self._begun = epoch
        self._ranks.from_main(lambda: self._note(epoch, step))
        if log:
            self._tell(step, log)
        return True

    def restore(self, step: int) -> None:
        """Go back to the generation that a checkpoint names.

        Raises:
            GenerationError: it is missing or damaged.
        """
        if self.current != step:
            self._take_up(self._pinned or self._folder.generation(step))

    def restart(self, epoch: int) -> None:
        """Begin an epoch with what is newest then, whatever the run took up before."""
        if not self._pinned and self._ranks.is_main:
            self._epochs.forget_from(epoch)
            self._folder.remove_encoders()

    def saved(self) -> None:
        """Remove what only checkpoints needed that are gone now."""
        if not self._pinned and self._ranks.is_main:
            self._remove_replaced()

    def describe(self) -> str:
        """Where the maps come from, for the run's plan."""
        if self._pinned:
            return f"from {self._pinned}"
        due = self._config.refreshes
        lacks = "" if self._is_followed or not due else f"; none does: start `{self._job}`"
        return (
            f"made anew {len(due)} times, every {due.step} epochs, by a job that follows this run"
            f"{lacks}"
        )

    def close(self, *, finished: bool) -> None:
        """If the run is over, tell the job that no encoder will follow."""
        if finished and self._ranks.is_main:
            self._folder.finish()

    @property
    def _job(self) -> str:
        """The command that makes the run's generations."""
        return f"famt refresh --follow {self._config.out}"

    def _find_follower(self) -> bool:
        """Whether a job follows the run; one that waits for its maps can't do without.

        Raises:
            UserError: no job came up.
        """
        waits = self._config.refresh.wait and self._config.refreshes
        until = time.monotonic() + _PATIENCE
        if waits and not self._folder.is_followed():
            said = f"no job follows {self._config.out}, whose maps this run waits for"
            print(f"{said}: start `{self._job}`", file=sys.stderr, flush=True)
        while not (followed := self._folder.is_followed()) and waits:
            if time.monotonic() > until:
                raise UserError(
                    f"--refresh.wait: no job follows {self._config.out}. `famt pretrain` "
                    f"brings one along; else start `{self._job}` first"
                )
            time.sleep(_POLL)
        return followed

    def _await(self, step: int, stop: Stop, log: Log | None) -> bool:
        """Wait for the generation of a step; False if any rank is asked to stop instead."""
        while True:
            made, asked = zip(*self._ranks.gather((self._made(step), stop.asked)), strict=True)
            if isinstance(made[0], str):
                raise OSError(f"no generation of step {step} was made: {made[0]}")
            if any(asked):
                return False
            if made[0]:
                return True
            if log:
                self._tell_of_job(step, log)
            time.sleep(_POLL)

    def _made(self, step: int) -> bool | str:
        """Whether the generation of a step is there, or why it could not be made."""
        if self._folder.generation(step).exists():
            return True
        return _text(self._folder.failure(step)) or False

    def _newest(self) -> int | None:
        """Step of the newest generation."""
        return max(map(step_of, generations(self._folder.path)), default=None)

    def _exchange(self, wanted: int | None, epoch: int, step: int, log: Log | None) -> None:
        """Take up the generation of a step, unless it is in use."""
        if wanted in (None, self.current):
            return
        started = time.perf_counter()
        self._take_up(self._folder.generation(wanted))
        if log:
            log.event(
                step,
                "generation",
                tell=True,
                epoch=epoch,
                generation=wanted,
                kinds=self._kinds,
                age_steps=step - wanted,
                pause_ms=1000 * (time.perf_counter() - started),
            )

    def _take_up(self, path: Path) -> None:
        """Exchange the maps for those of a generation.

        Raises:
            GenerationError, OSError: a machine can't read it; on every rank, and the maps stay.
        """
        maps, problem = {}, None
        if self._leads:
            until = time.monotonic() + (0 if self._ranks.is_main else _SEEN_WITHIN)
            while not path.exists() and time.monotonic() < until:
                time.sleep(_POLL)
            try:
                maps = self._load(path)
            except (GenerationError, OSError) as error:
                problem = error
        for each in self._ranks.gather(problem):
            if each:
                raise each
        for kind, new in maps.items():
            self._maps[kind].copy_(new)
        self._ranks.gather(None)  # nobody reads before all have written
        self.current = step_of(path)

    def _load(self, path: Path) -> dict[str, Tensor]:
        generation = open_generation(path)
        if not self._pinned and generation.run != self._run:
            raise GenerationError(f"{path} is of {generation.run}, not of {self._run}; remove it")
        return generation.maps(self._samples, self._kinds, self.grid)

    def _note(self, epoch: int, step: int) -> None:
        self._epochs.write(epoch, step, self.current)
        if self.current is not None:
            self._folder.remove_encoders(self.current)
        self._remove_replaced()

    def _remove_replaced(self) -> None:
        """Remove generations before the one in use that no checkpoint would take up again."""
        steps = checkpoint.steps(self._config.out)
        needed = self._epochs.generations_since(steps[0] if steps else 0)
        for path in generations(self._folder.path):
            step = step_of(path)
            if self.current is not None and step < self.current and step not in needed:
                path.unlink(missing_ok=True)

    def _leave_encoder(self, step: int, log: Log | None) -> None:
        """Leave the encoder where the job finds it."""
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
        checkpoint.save_encoder(path, encoder)
        if log:
            log.event(step, "refresh due", tell=True, encoder=path)

    def _tell_of_job(self, step: int, log: Log) -> None:
        """Say that no job follows the run any more."""
        if self._is_followed and not self._folder.is_followed():
            self._is_followed = False
            log.event(step, "refresh job ended", tell=True, to_start_one=self._job)

    def _tell(self, step: int, log: Log) -> None:
        """Say that no job follows the run any more, and what it could not make."""
        self._tell_of_job(step, log)
        for each in self._folder.encoders():
            if reason := _text(self._folder.failure(each)):
                self._folder.failure(each).unlink(missing_ok=True)
                log.event(step, "refresh failed", tell=True, reason=reason)


def lost_generations(resumed: Checkpoint, config: Pretrain, samples: SampleTable) -> list[str]:
    """Generations that a run takes up again when it goes on exactly, and that can't be read."""
    if not config.refreshed_kinds or config.refresh.pin:
        return []
    folder, lost = RefreshFolder(config.out), []
    needed = Epochs(folder, resumed.run).generations_since(resumed.step)
    for state in resumed.signals.values():
        if state.get("generation") is not None:
            needed.add(state["generation"])
    for path in map(folder.generation, sorted(needed)):
        try:
            open_generation(path).maps(samples, config.refreshed_kinds, config.sizes.grid)
        except GenerationError:
            lost.append(str(path))
    return lost


def _text(path: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


class Refreshed(Signal):
    """Maps of one kind from the newest generation; nothing before the first."""

    def __init__(self, slot: FrequencyConfig | AttentionConfig, context: Context) -> None:
        assert context.refreshed is not None
        self.exponent, self._kind, self._maps = slot.exponent, slot.kind, context.refreshed

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        return self._maps.begin_epoch(epoch, step, stop, log)

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        return self._maps.read(self._kind, crops)

    def state_dict(self) -> dict[str, Any]:
        return {"generation": self._maps.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["generation"] is not None:
            self._maps.restore(state["generation"])

    def restart(self, state: dict[str, Any], epoch: int) -> None:
        self._maps.restart(epoch)

    def saved(self, step: int, log: Log | None) -> None:
        self._maps.saved()

    def describe(self) -> str:
        return (
            f"{self._kind} of whole images to the power {self.exponent:g}, {self._maps.describe()}"
        )

    def close(self, *, finished: bool) -> None:
        self._maps.close(finished=finished)


class CachedThenRefreshed(Refreshed):
    """The pixel score until there is a generation of the model's own."""

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        self._cached = Cached(slot, context)
        super().__init__(slot, context)
        self._own_exponent = slot.exponent

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        refreshed = super().read(crops, step)
        if refreshed is None:
            self.exponent = self._cached.exponent
            return self._cached.read(crops, step)
        self.exponent = self._own_exponent
        return refreshed

    def describe(self) -> str:
        self.exponent = self._own_exponent
        return f"{self._cached.describe()} until there is {super().describe()}"
