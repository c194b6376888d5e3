"""Maps of whole images that follow the model: marked here, made by a job beside, taken up here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.cache import ScoreCache
from pipeline.generations import Generation
from pipeline.join import crop_scores
from pipeline.loader import CropBatch
from pipeline.manifest import CacheError
from pipeline.scores import ModelScoreSpec
from pipeline.table import SampleTable
from train import checkpoint
from train.checkpoint import Encoder
from train.config import Pretrain
from train.distributed import Ranks
from train.log import Log
from train.streams import Stop

_POLL = 2.0  # seconds


def encoder_path(out: Path, step: int) -> Path:
    """Where a run leaves the encoder of a step, for a generation to be made from it."""
    return out / "refresh" / f"encoder-{step:08d}.pt"


def finished_path(out: Path) -> Path:
    """What a run leaves when no encoder will follow."""
    return out / "refresh" / "finished"


class PeriodicAttention:
    """The newest generation of whole-image maps, exchanged for a newer one between two epochs.

    A thread reads a generation as soon as it is published; at the end of an epoch the ranks agree
    on the newest that all machines have in RAM, and only copy it. Which epoch took up which
    generation is written down: a resumed run takes up the same at the same epochs.

    Attributes:
        current: the generation in use, or None before the first.
    """

    def __init__(
        self, config: Pretrain, run: str, table: SampleTable, grid: int, here: Ranks
    ) -> None:
        self.current: Generation | None = None
        self._config, self._run, self._table, self._here = config, run, table, here
        self._grid = grid
        self._pin = config.periodic.pin
        self._source = run
        self._pinned_step: int | None = None
        if self._pin:
            self._source, self._pinned_step = _parse_pin(self._pin)
        self._cache = ScoreCache(config.cache)
        shape = (len(table), grid, grid)
        self._maps = here.share(lambda: torch.ones(shape, dtype=torch.float16))
        self._leads = here.gather(here.node).index(here.node) == here.rank
        self._taken_up = _TakenUp(config.out / "generations.json")
        self._saved: deque[int] = deque(maxlen=config.keep_checkpoints)
        self._job: subprocess.Popen[bytes] | None = None
        self._job_step: int | None = None
        self._read_ahead: int | None = None
        self._ahead = _Preloader(self._newest, self._load_ahead)
        if here.is_main:
            finished_path(config.out).unlink(missing_ok=True)
        if self._pinned_step is not None:
            self._take_up(self._pinned_step)
            if here.is_main:
                self._need()
        else:
            ModelScoreSpec(config.periodic.kind, grid, 0, "").describe()  # is there such a kind?
            if self._leads:
                self._ahead.start()

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        """Scores of crops, `[B, grid**2]` float32 on their device; None before a generation."""
        return crop_scores(self._maps, crops, self._grid) if self.current else None

    def begin_epoch(
        self, epoch: int, step: int, encoder: nn.Module, stop: Stop, log: Log | None
    ) -> bool:
        """Mark the encoder if a generation is due, and take up a new one; every rank calls this.

        Returns:
            False if the run was asked to stop while it waited for a generation.

        Raises:
            OSError: the job that the run waits for failed.
        """
        config = self._config
        since = epoch - config.plain_epochs
        if self._pinned_step is not None:
            return True
        due = since >= 0 and since % config.periodic.every == 0
        with self._on_main(step, log) as main:
            if main and due:
                self._mark(step, encoder, log)
            if main:
                self._tend_job(step, log)
        started = time.perf_counter()
        if due and config.refresh == "wait" and not self._await(epoch, step, stop, log):
            return False
        wanted = self._agree(epoch)
        if wanted is not None and (self.current is None or wanted != self.current.step):
            self._take_up(wanted)
            if log and self.current:
                log.event(
                    step,
                    "generation",
                    tell=True,
                    epoch=epoch,
                    generation=wanted,
                    age_steps=step - wanted,
                    coverage=self.current.images / len(self._table),
                    pause_ms=1000 * (time.perf_counter() - started),
                )
                self._drop_encoders(wanted)
        if due and self.current is None and log:
            log.event(step, "no maps yet", tell=True, training="as a plain MAE until there are")
        with self._on_main(step, log) as main:
            if main:
                self._taken_up.record(epoch, self.current.step if self.current else None)
                if self.current:
                    self._need()
        return True

    def restore(self, step: int) -> None:
        """Go back to the generation that a checkpoint names; every rank calls this.

        Raises:
            CacheError: it was collected.
        """
        self._take_up(step)

    def restart(self, epoch: int) -> None:
        """Let an epoch and those after it take up what is newest, whatever they took up before."""
        if self._here.is_main:
            self._taken_up.forget_from(epoch)
            for path in encoder_path(self._config.out, 0).parent.glob("encoder-*.pt"):
                path.unlink()

    def saved(self, step: int, log: Log | None) -> None:
        """Keep the generation of the checkpoint that was just written from being collected."""
        with self._on_main(step, log) as main:
            if main and self.current:
                self._saved.append(self.current.step)
                self._need()

    def close(self, *, finished: bool) -> None:
        """Stop reading ahead; if the run is over, the job that nobody waits for as well."""
        self._ahead.stop()
        if finished and self._here.is_main:
            if self._job is not None:
                self._job.terminate()
                self._job.wait()
            for path in encoder_path(self._config.out, 0).parent.glob("encoder-*.pt"):
                path.unlink()  # no epoch is left that could take up its maps
            finished_path(self._config.out).parent.mkdir(exist_ok=True)
            finished_path(self._config.out).touch()

    def _await(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        """Wait for the generation that an epoch begins with; False if asked to stop instead."""
        failure = None
        if self._here.is_main and not self._taken_up.at(epoch)[0]:
            failure = self._wait_for(step, stop, log)
            if failure is None and not stop.asked:
                self._taken_up.record(epoch, step)
        failure, asked = self._here.gather((failure, stop.asked))[0]
        if failure:
            raise OSError(failure)
        return not asked

    def _agree(self, epoch: int) -> int | None:
        """The step of the generation that this epoch uses, the same on all ranks."""
        taken_up = self._taken_up.at(epoch) if self._here.is_main else None
        known, step = self._here.gather(taken_up)[0]
        if known:
            return step
        ready = self._ahead.ready
        offers = self._here.gather((self._leads, ready[0].step if ready else None))
        steps = [offer for leads, offer in offers if leads]
        newest = None if None in steps else min(steps)
        current = self.current.step if self.current else -1
        return newest if newest is not None and newest > current else None

    def _take_up(self, step: int) -> None:
        ready = self._ahead.ready
        if ready and ready[0].step == step:
            self.current, maps = ready
        else:
            found = [each for each in self._generations() if each.step == step]
            if not found:
                remedy = "" if self._pin else "; with --elastic the run takes up the newest"
                raise CacheError(
                    f"generation {self._source}/{step} of these shards is not in the cache: "
                    f"`python jobs/cache.py ls --cache {self._cache.url}` lists those that "
                    f"are{remedy}"
                )
            if found[0].spec.grid != self._grid:
                raise CacheError(
                    f"generation {self._source}/{step} has {found[0].spec.grid} cells a side, and "
                    f"the model's crops {self._grid}"
                )
            self.current = found[0]
            maps = self._load(found[0]) if self._leads else self._maps
        if self._leads:
            self._maps.copy_(maps)
        self._here.gather(None)  # nobody reads before all have written
        self._ahead.forget(step)

    @contextmanager
    def _on_main(self, step: int, log: Log | None) -> Iterator[bool]:
        """Whether this rank is the main one, whose trouble with a disk or store is only logged:
        training goes on with the maps that it has."""
        try:
            yield self._here.is_main
        except (*storage.UNREACHABLE, CacheError) as error:
            if log:
                log.event(step, "refresh put off", tell=True, reason=storage.reason(error))

    def _need(self) -> None:
        current = self.current.step if self.current else None
        steps = [each for each in (*self._saved, current, self._read_ahead) if each is not None]
        self._cache.generations.need(self._source, steps, by=self._run)

    def _generations(self) -> list[Generation]:
        found = self._cache.generations.of(self._source)
        found = [each for each in found if each.data == self._table.digest]
        kind = self._config.periodic.kind
        return [each for each in found if self._pin or each.spec.kind == kind]

    def _newest(self) -> Generation | None:
        found = self._generations()
        return found[-1] if found else None

    def _load(self, generation: Generation) -> Tensor:
        maps = self._cache.read_maps(self._table.shard_ids, generation.spec)
        return torch.from_numpy(np.concatenate(maps))

    def _load_ahead(self, generation: Generation) -> Tensor:
        """Read a generation that an epoch may begin with, and keep it from being collected."""
        if self._here.is_main:
            self._read_ahead = generation.step
            self._need()
        return self._load(generation)

    def _mark(self, step: int, encoder: nn.Module, log: Log | None) -> None:
        """Leave the encoder where the refresh job finds it."""
        path = encoder_path(self._config.out, step)
        if path.exists() or self._published(step):
            return
        config = self._config
        sizes = dataclasses.asdict(config.sizes)
        marked = Encoder(self._run, step, sizes, encoder.state_dict(), config.describe())
        checkpoint.save_encoder(path, marked)
        if log:
            log.event(step, "refresh due", tell=True, encoder=path)

    def _tend_job(self, step: int, log: Log | None) -> None:
        """Start the job for the newest encoder that has no generation yet; again if it failed."""
        marked = sorted(encoder_path(self._config.out, 0).parent.glob("encoder-*.pt"))
        code = self._job.poll() if self._job else 0
        if self._config.refresh == "follow" or not marked or code is None:
            return
        wanted = int(marked[-1].stem.split("-")[1])
        if self._published(wanted):
            return
        output = marked[-1].with_suffix(".log")
        if code and log:
            log.event(step, "refresh failed", tell=True, exit_code=code, see=output)
        job = self._config.refresh_job
        command = [
            sys.executable, "-m", "jobs.refresh_scores", "--checkpoint", str(marked[-1]),
            "--cpus-per-worker", str(job.cpus_per_worker),
            "--gpus-per-worker", str(job.gpus_per_worker),
            *(["--workers", str(job.workers)] if job.workers else []),
        ]  # fmt: skip
        with open(output, "ab") as file:
            self._job = subprocess.Popen(command, stdout=file, stderr=file)
        self._job_step = wanted

    def _published(self, step: int) -> bool:
        """Whether a generation is known to be there; not if the cache is out of reach."""
        try:
            return any(generation.step == step for generation in self._generations())
        except storage.UNREACHABLE:
            return False

    def _wait_for(self, step: int, stop: Stop, log: Log | None) -> str | None:
        """Wait until a generation is there or a signal comes; returns why none will, or None."""
        while not self._published(step) and not stop.asked:
            ended = self._job is not None and self._job.poll() is not None
            if ended and self._job_step == step and not self._published(step):
                output = encoder_path(self._config.out, step).with_suffix(".log")
                return f"the refresh job of step {step} failed; see {output}"
            self._tend_job(step, log)  # the job before this one may only just have ended
            time.sleep(_POLL / 10)
        return None

    def _drop_encoders(self, step: int) -> None:
        for path in encoder_path(self._config.out, 0).parent.glob("encoder-*.pt"):
            if path <= encoder_path(self._config.out, step):
                path.unlink(missing_ok=True)


def _parse_pin(pin: str) -> tuple[str, int]:
    run, _, step = pin.rpartition("/")
    if not run or not step.isdigit():
        raise ValueError(f"--periodic.pin {pin}: must be <run>/<step>")
    return run, int(step)


class _TakenUp:
    """Which epochs of a run began with which generation, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._epochs: dict[str, int | None] = {}
        if path.exists():
            try:
                self._epochs = json.loads(path.read_text())
            except ValueError:
                raise ValueError(
                    f"{path} is damaged; remove it, and the run goes on with the newest generations"
                ) from None

    def at(self, epoch: int) -> tuple[bool, int | None]:
        """Whether that epoch began before, and with which generation."""
        return str(epoch) in self._epochs, self._epochs.get(str(epoch))

    def forget_from(self, epoch: int) -> None:
        """Drop what is known of an epoch and those after it."""
        self._epochs = {each: step for each, step in self._epochs.items() if int(each) < epoch}

    def record(self, epoch: int, step: int | None) -> None:
        """Write down with which generation an epoch begins."""
        if self.at(epoch) != (True, step):
            self._epochs[str(epoch)] = step
            partial = self._path.with_suffix(".partial")
            with open(partial, "w") as file:
                file.write(json.dumps(self._epochs))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)


class _Preloader(threading.Thread):
    """Reads the newest generation into RAM as soon as it is there.

    Attributes:
        ready: the newest generation that was read, with its maps `[R, G, G]`, until it is taken up.
    """

    def __init__(
        self, newest: Callable[[], Generation | None], load: Callable[[Generation], Tensor]
    ) -> None:
        super().__init__(daemon=True)
        self.ready: tuple[Generation, Tensor] | None = None
        self._newest, self._load = newest, load
        self._stopped = threading.Event()
        self._seen = -1

    def run(self) -> None:
        while not self._stopped.wait(_POLL):
            try:
                newest = self._newest()
                if newest is not None and newest.step > self._seen:
                    self.ready = (newest, self._load(newest))
                    self._seen = newest.step
            except (*storage.UNREACHABLE, CacheError):
                continue  # a store out of reach, or maps that were just collected: look again later

    def forget(self, step: int) -> None:
        """Give the memory of a generation free that was taken up."""
        if self.ready and self.ready[0].step <= step:
            self.ready = None
        self._seen = max(self._seen, step)

    def stop(self) -> None:
        self._stopped.set()
