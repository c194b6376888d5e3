"""A run's folder `refresh`: what it and the job that scores images for it leave for each other.

    encoder-<step>.pt        a generation is due of this encoder            by the run
    generation-<step>.zip    and was made: `famt.pipeline.generation`       by the job
    encoder-<step>.failed    or could not be made, and why                  by the job
    epochs.json              which epoch began with which generation        by the run
    finished                 no encoder will follow                         by the run
    follower.lock            locked by the job as long as it follows the run

The life of a generation:

1. When it is due, at the beginning of an epoch, the run writes its encoder.
2. The job makes a generation of the newest encoder that has none. What it can't make it tries again
   every minute.
3. The run takes up the newest generation when its next epoch begins, on all ranks, and writes that
   down: a resumed run takes up the same ones. It removes that encoder and those before it.
4. The run removes a generation that a newer one replaced, unless a checkpoint that is left would
   take it up again.

So nothing is lost when either is killed, and all goes with the folder.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from famt.pipeline.errors import UserError
from famt.pipeline.generation import generation_path
from famt.train.files import written_whole


class RefreshFolder:
    """The folder `refresh` of the run in `out`."""

    def __init__(self, out: Path) -> None:
        self.path = out / "refresh"
        self.finished = self.path / "finished"
        self._lock = self.path / "follower.lock"

    def encoder(self, step: int) -> Path:
        """Where the run leaves the encoder of a step."""
        return self.path / f"encoder-{step:08d}.pt"

    def failure(self, step: int) -> Path:
        """Where the job writes why it could not make the generation of a step."""
        return self.encoder(step).with_suffix(".failed")

    def generation(self, step: int) -> Path:
        """Where the job puts the generation of a step."""
        return generation_path(self.path, step)

    def encoders(self) -> list[int]:
        """Steps of the encoders that are there, oldest first."""
        return sorted(int(each.stem.removeprefix("encoder-")) for each in self._encoders())

    def due(self) -> int | None:
        """The step of the newest encoder, unless its generation is there."""
        newest = max(self.encoders(), default=None)
        return None if newest is None or self.generation(newest).exists() else newest

    def remove_encoders(self, up_to: int | None = None) -> None:
        """Remove those that no generation is wanted of any more: up to a step, or all."""
        for step in self.encoders():
            if up_to is None or step <= up_to:
                self.encoder(step).unlink(missing_ok=True)
                self.failure(step).unlink(missing_ok=True)

    def finish(self) -> None:
        """Tell the job that no encoder will follow."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.remove_encoders()
        self.finished.touch()

    @contextmanager
    def followed(self) -> Iterator[int]:
        """Show the run that a job follows it, for as long as this context is open.

        Yields:
            a descriptor; a process that inherits it shows the same as long as it lives.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "a+") as held:
            fcntl.flock(held, fcntl.LOCK_SH)  # several jobs may follow one run
            yield held.fileno()

    def is_followed(self) -> bool:
        """Whether a job follows the run; the kernel forgets one that was killed."""
        try:
            with open(self._lock, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _encoders(self) -> list[Path]:
        return list(self.path.glob("encoder-*.pt"))


class Epochs:
    """Which epochs of a run began at which step with which generation, kept in `epochs.json`.

    Args:
        folder: of the run.
        run: its id; what the file tells of another run is forgotten.

    Attributes:
        new: no file of this run was there.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: RefreshFolder, run: str) -> None:
        self._path, self._run = folder.path / "epochs.json", run
        self._begun: dict[int, tuple[int, int | None]] = {}  # epoch -> step, generation
        try:
            content = json.loads(self._path.read_text())
            self.new = content["run"] != run
            if not self.new:
                self._begun = {int(epoch): (*each,) for epoch, each in content["epochs"].items()}
        except FileNotFoundError:
            self.new = True
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self._path} is damaged; remove it, and the run goes on with the newest "
                "generations"
            ) from None

    def at(self, epoch: int) -> tuple[bool, int | None]:
        """Whether that epoch began before, and with which generation."""
        return epoch in self._begun, self._begun.get(epoch, (0, None))[1]

    def generations_since(self, step: int) -> set[int]:
        """Generations of the epoch that ends with a step or is in it, and of later ones."""
        first = max((at for at, _ in self._begun.values() if at < step), default=0)
        return {each for at, each in self._begun.values() if at >= first and each is not None}

    def forget_from(self, epoch: int) -> None:
        """Drop what is known of an epoch and those after it."""
        self._begun = {each: begun for each, begun in self._begun.items() if each < epoch}

    def write(self, epoch: int, step: int, generation: int | None) -> None:
        """Write down with which generation an epoch begins."""
        self._begun[epoch] = step, generation
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path) as file:
            file.write(json.dumps({"run": self._run, "epochs": self._begun}).encode())
