"""A run's side of a generation's life (`famt.pipeline.generations`): due, waited for, taken up.

Encoders go to the job by `famt.train.signals.due`; which epoch began with which generation is
written to <out>/generations.json.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.pipeline import storage
from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.generations import Generation
from famt.pipeline.join import crop_scores
from famt.pipeline.loader import CropBatch
from famt.pipeline.scores import check_model_kinds
from famt.pipeline.table import SampleTable, load_generation, usable_generations
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint, Encoder
from famt.train.config import Pretrain
from famt.train.distributed import Ranks
from famt.train.log import Log
from famt.train.signals.ahead import ReadAhead
from famt.train.signals.due import (
    due_encoders,
    encoder_path,
    failed_path,
    finished_path,
    is_followed,
    remove_encoders,
    write_finished,
)
from famt.train.signals.record import Record
from famt.train.streams import Stop

_POLL = 0.2  # seconds
_PATIENCE = 60.0  # seconds that a job may take to come up beside a run that needs it


class FollowedMaps:
    """The newest generation of a run's maps, exchanged for a newer one between two epochs.

    A thread on each machine reads a generation as soon as it is published. When an epoch begins,
    the ranks agree on the newest that all machines have in RAM, and copy it. A resumed run takes up
    the same generations at the same epochs as before.

    Attributes:
        current: the generation in use, or None before the first.
        grid: cells a side of the maps.
    """

    def __init__(
        self,
        run: str,
        config: Pretrain,
        samples: SampleTable,
        cache: ScoreCache,
        encoder: VisionTransformer,
        ranks: Ranks,
    ) -> None:
        check_model_kinds(config.refreshed_kinds)
        self.current: Generation | None = None
        self._run, self._config, self._samples, self._cache = run, config, samples, cache
        self._encoder, self._ranks, self.grid = encoder, ranks, config.sizes.grid
        self._kinds = config.refreshed_kinds
        self._source, self._pinned = run, None
        if config.refresh.pin:
            self._source, self._pinned = _parse_pin(config.refresh.pin)
        shape = (len(samples), self.grid, self.grid)
        self._maps = {
            kind: ranks.share(lambda: torch.ones(shape, dtype=torch.float16))
            for kind in self._kinds
        }
        self._leads = ranks.gather(ranks.node).index(ranks.node) == ranks.rank
        self._begun, self._told = -1, False
        self._read_ahead: int | None = None
        self._ahead = ReadAhead(self._newest, self._load_ahead)
        self._record = Record(_record_path(config), run)
        if ranks.is_main:
            if self._record.new:  # what an earlier run left that wrote no checkpoint
                remove_encoders(self._config.out)
            finished_path(config.out).unlink(missing_ok=True)
        if self._pinned is not None:
            self._take_up(self._pinned)
        elif self._leads:
            self._ahead.start()
        ranks.from_main(self._need)
        self._is_followed: bool = ranks.from_main(self._find_follower)

    def read(self, kind: str, crops: CropBatch) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float32 on their device; None before a generation."""
        return crop_scores(self._maps[kind], crops, self.grid) if self.current else None

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        """Leave the encoder if a generation is due, and take up a new one; every rank calls this.

        Returns:
            False if the run was asked to stop while it waited for a generation.

        Raises:
            OSError: the generation that the run waits for was not made.
        """
        if self._begun == epoch or self._pinned is not None:
            return True
        config, due = self._config.refresh, epoch in self._config.refreshes
        known, recorded = self._ranks.from_main(lambda: self._record.at(epoch))
        if due:
            self._on_main(lambda: self._leave_encoder(step, log), step, log, must=config.wait)
        if due and config.wait and not known and not self._await(step, stop, log):
            return False
        started = time.perf_counter()
        wanted = recorded if known else step if due and config.wait else self._agree()
        if wanted is not None and (self.current is None or wanted != self.current.step):
            self._take_up(wanted)
            if log and self.current:
                log.event(
                    step,
                    "generation",
                    tell=True,
                    epoch=epoch,
                    generation=wanted,
                    kinds=self._kinds,
                    age_steps=step - wanted,
                    coverage=self.current.images / len(self._samples),
                    pause_ms=1000 * (time.perf_counter() - started),
                )
        self._begun = epoch
        self._on_main(lambda: self._note(epoch, step), step, log)
        self._on_main(lambda: self._ask_again(step, log), step, log)
        if log:
            self._tell(step, log)
        return True

    def restore(self, step: int) -> None:
        """Go back to the generation that a checkpoint names; every rank calls this.

        Raises:
            CacheError: it was collected.
        """
        if self.current is None or self.current.step != step:
            self._take_up(step)

    def restart(self, epoch: int) -> None:
        """Begin an epoch with what is newest now, whatever the run took up before."""
        if self._ranks.is_main:
            self._record.forget_from(epoch)
            remove_encoders(self._config.out)
        newest = self._ranks.from_main(self._newest)
        if newest is not None and (self.current is None or self.current.step != newest.step):
            self._take_up(newest.step)

    def saved(self, step: int, log: Log | None) -> None:
        """Give up what only checkpoints needed that are gone now."""
        self._on_main(self._need, step, log)

    def describe(self) -> str:
        """Where the maps come from, for the run's plan."""
        if self._pinned is not None:
            return f"from generation {self._config.refresh.pin}"
        due = self._config.refreshes
        lacks = "" if self._is_followed or not due else f"; none does: start `{self._job}`"
        return (
            f"made anew {len(due)} times, every {due.step} epochs, by a job that follows this run"
            f"{lacks}"
        )

    def close(self, *, finished: bool) -> None:
        """Stop reading ahead; if the run is over, tell the job that nothing will follow."""
        self._ahead.stop()
        if finished and self._ranks.is_main:
            remove_encoders(self._config.out)  # no epoch is left that could take up their maps
            write_finished(self._config.out)

    @property
    def _job(self) -> str:
        """The command that makes the run's generations."""
        return f"famt refresh --follow {self._config.out}"

    def _find_follower(self) -> bool:
        """Whether a job follows the run; one that waits for its maps can't do without.

        Raises:
            ValueError: no job came up.
        """
        found, needed = is_followed(self._config.out), self._config.refresh.wait
        if found or not needed or not self._config.refreshes:
            return found
        said = f"no job follows {self._config.out}, whose maps this run waits for"
        print(f"{said}: start `{self._job}`", file=sys.stderr, flush=True)
        until = time.monotonic() + _PATIENCE
        while not is_followed(self._config.out):
            if time.monotonic() > until:
                raise UserError(
                    f"--refresh.wait: no job follows {self._config.out}. `famt pretrain` "
                    f"brings one along; else start `{self._job}` first"
                )
            time.sleep(_POLL)
        return True

    def _await(self, step: int, stop: Stop, log: Log | None) -> bool:
        """Wait for the generation of a step; False if any rank is asked to stop instead."""
        while True:
            answers = self._ranks.gather(
                (self._made(step) if self._ranks.is_main else None, stop.asked)
            )
            made = answers[0][0]
            if isinstance(made, str):
                raise OSError(f"no generation of step {step} was made: {made}")
            if any(asked for _, asked in answers):
                return False
            if made:
                return True
            if log:
                self._tell_of_job(step, log)
            time.sleep(_POLL)

    def _made(self, step: int) -> bool | str:
        """Whether the generation of a step is published, or why it could not be made."""
        if self._published(step):
            return True
        failed = failed_path(encoder_path(self._config.out, step))
        try:
            return failed.read_text().strip()
        except FileNotFoundError:
            return False

    def _agree(self) -> int | None:
        """The step of the newest generation that all machines have read, if it is a newer one."""
        ready = self._ahead.ready
        offers = self._ranks.gather((self._leads, ready[0].step if ready else None))
        steps = [offer for leads, offer in offers if leads]
        newest = None if None in steps else min(steps)
        current = self.current.step if self.current else -1
        return newest if newest is not None and newest > current else None

    def _take_up(self, step: int) -> None:
        ready = self._ahead.ready
        maps: dict[str, Tensor] = {}
        if ready and ready[0].step == step:
            self.current, maps = ready
        else:
            found = [each for each in self._generations() if each.step == step]
            if not found:
                remedy = (
                    ""
                    if self._pinned is not None
                    else "; with --elastic the run takes up the newest"
                )
                raise CacheError(
                    f"generation {self._source}/{step} of these shards, with maps of "
                    f"{', '.join(self._kinds)}, is not in the cache: `famt cache ls "
                    f"--cache {self._cache.url}` lists those that are{remedy}"
                )
            self.current = found[0]
            maps = self._load(found[0]) if self._leads else {}
        if self._leads:
            for kind, held in self._maps.items():
                held.copy_(maps[kind])
        self._ranks.gather(None)  # nobody reads before all have written
        self._ahead.forget(step)

    def _on_main(
        self, work: Callable[[], None], step: int, log: Log | None, *, must: bool = False
    ) -> None:
        """Work of the main rank, whose trouble with a disk or store is only logged unless it must
        be done: training goes on with the maps that it has."""

        def tolerant() -> None:
            try:
                work()
            except (*storage.UNREACHABLE, CacheError) as error:
                if must:
                    raise
                if log:
                    log.event(step, "refresh put off", tell=True, reason=storage.reason(error))

        self._ranks.from_main(tolerant)

    def _note(self, epoch: int, step: int) -> None:
        self._record.write(epoch, step, self.current.step if self.current else None)
        if self.current:
            remove_encoders(self._config.out, self.current.step)
        self._need()

    def _need(self) -> None:
        """Say which generations must stay: in use, read just now, or to be repeated on resume."""
        steps = checkpoint.steps(self._config.out)
        needed = self._record.since(steps[0] if steps else 0)
        needed |= {self.current.step if self.current else None, self._read_ahead}
        known = [each for each in needed if each is not None]
        if known:
            self._cache.generations.need(self._source, known, by=self._run)

    def _generations(self) -> list[Generation]:
        return _usable(self._source, self._config, self._samples, self._cache)

    def _newest(self) -> Generation | None:
        found = self._generations()
        return found[-1] if found else None

    def _load(self, generation: Generation) -> dict[str, Tensor]:
        return load_generation(self._samples, self._cache, generation, self._kinds)

    def _load_ahead(self, generation: Generation) -> dict[str, Tensor]:
        """Read a generation that an epoch may begin with, and keep it from being collected."""
        if self._ranks.is_main:
            self._read_ahead = generation.step
            self._need()
        return self._load(generation)

    def _leave_encoder(self, step: int, log: Log | None) -> None:
        """Leave the encoder where the refresh job finds it."""
        path = encoder_path(self._config.out, step)
        failed_path(path).unlink(missing_ok=True)
        if self._published(step):
            return
        if path.exists():
            path.touch()  # the job makes it again, should its maps be gone
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

    def _ask_again(self, step: int, log: Log | None) -> None:
        """Say that a published generation can't be read, and have the job make it again."""
        if self._ahead.lost is None:
            return
        generation, reason = self._ahead.lost
        path = encoder_path(self._config.out, generation or 0)
        if asked := generation is not None and path.exists():
            path.touch()
        if log:
            log.event(step, "generation lost", tell=True, reason=reason, asked_for_again=asked)

    def _published(self, step: int) -> bool:
        """Whether a generation is there with all its maps; not if the cache is out of reach."""
        try:
            return any(
                each.step == step and not self._cache.lacking(self._samples.shard_ids, each.specs)
                for each in self._generations()
            )
        except storage.UNREACHABLE:
            return False

    def _tell_of_job(self, step: int, log: Log) -> None:
        """Say that no job follows the run any more."""
        if self._is_followed and not is_followed(self._config.out):
            self._is_followed = False
            log.event(step, "refresh job ended", tell=True, to_start_one=self._job)

    def _tell(self, step: int, log: Log) -> None:
        """Say why a generation failed, and once what the run goes on with where none was made."""
        self._tell_of_job(step, log)
        due = due_encoders(self._config.out)
        for failed in (failed_path(each) for each in due):
            if failed.exists():
                reason = failed.read_text().strip()
                failed.unlink()
                log.event(step, "refresh failed", tell=True, reason=reason)
        late = not self.current and any(each < encoder_path(self._config.out, step) for each in due)
        if late and not self._told:
            self._told = True
            others = self._config.frequency.source == "cached-then-refreshed"
            goes_on = "the cached score" if others else "what other signals say, or plain MAE"
            log.event(
                step,
                "no generation yet",
                tell=True,
                going_on_with=goes_on,
                to_make_one=self._job,
            )


def lost_generations(
    resumed: Checkpoint, config: Pretrain, samples: SampleTable, cache: ScoreCache
) -> list[str]:
    """Generations that a run takes up again when it goes on exactly, and that are gone."""
    if not config.refreshed_kinds or config.refresh.pin:
        return []
    needed = Record(_record_path(config), resumed.run).since(resumed.step)
    needed |= {state.get("generation") for state in resumed.signals.values()}
    there = {each.step for each in _usable(resumed.run, config, samples, cache)}
    return [
        f"generation {resumed.run}/{step} of score maps"
        for step in sorted(each for each in needed if each is not None and each not in there)
    ]


def _usable(
    run: str, config: Pretrain, samples: SampleTable, cache: ScoreCache
) -> list[Generation]:
    """Generations of a run that one with these options can take up, oldest first."""
    return usable_generations(samples, cache, run, config.refreshed_kinds, config.sizes.grid)


def _record_path(config: Pretrain) -> Path:
    return config.out / "generations.json"


def _parse_pin(pin: str) -> tuple[str, int]:
    run, _, step = pin.rpartition("/")
    if not run or not step.isdigit():
        raise UserError(f"--refresh.pin {pin}: must be <run>/<step>")
    return run, int(step)
