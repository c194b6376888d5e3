"""A run's folder `refresh`, through which the run and its refresh job communicate.

    encoder-<step>.pt        a generation by this encoder is due            written by the run
    generation-<step>.zip    the generation (scoring/generation.py)         written by the job
    encoder-<step>.failed    why it could not be made                       written by the job
    epochs.json              which epoch started with which generation      written by the run
    finished                 no encoder will follow                         written by the run
    follower.lock            locked by the job while it follows the run

The life of a generation:

1. When one is due, at the start of an epoch, the run writes its encoder.
2. The job makes a generation by the newest encoder that has none. It retries every minute after a
   failure.
3. At the start of its next epoch, the run takes up the newest generation on all ranks and records
   it: a resumed run takes up the same ones. It removes that encoder and older ones.
4. The run removes a replaced generation, unless a remaining checkpoint would take it up again.

So either may be killed without loss, and deleting the folder deletes everything.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.models import ModelConfig
from famt.pipeline.errors import UserError
from famt.pipeline.scoring.generation import generation_path
from famt.train import checkpoint
from famt.train.config import Pretrain
from famt.train.run_folder import written_whole


@dataclass(frozen=True)
class Encoder:
    """An encoder and what to score with it; the other attributes are those of `Checkpoint`.

    Attributes:
        kinds: model scores wanted.
        urls: tars to score, in the order of the run's rows; None for all that match its --shards.
    """

    run: str
    step: int
    sizes: dict[str, Any]
    weights: dict[str, Tensor]
    config: dict[str, Any]
    kinds: list[str]
    urls: list[str] | None = None

    def build(self) -> VisionTransformer:
        """The encoder, in eval mode."""
        encoder = ModelConfig(**self.sizes).encoder()
        encoder.load_state_dict(self.weights)
        return encoder.eval()


def load_encoder(path: Path) -> Encoder:
    """The encoder in a file `encoder-<step>.pt`, in a checkpoint, or in a run's last checkpoint.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file is neither, or of fine-tuning.
    """
    if path.is_dir() or checkpoint.is_checkpoint(path):
        state, prefix = checkpoint.load_pretrained(path), "encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in state.model.items()
            if name.startswith(prefix)
        }
        kinds = Pretrain.from_description(state.config).refreshed_kinds
        return Encoder(state.run, state.step, state.sizes, weights, state.config, kinds)
    try:
        return Encoder(**checkpoint.read(path))
    except TypeError:
        raise UserError(f"{path} is neither a checkpoint nor an encoder of a run") from None


class RefreshFolder:
    """The folder `refresh` of the run in `out`."""

    def __init__(self, out: Path) -> None:
        self.path = out / "refresh"
        self.finished = self.path / "finished"
        self._lock = self.path / "follower.lock"

    def encoder(self, step: int) -> Path:
        """Path of the encoder of a step."""
        return self.path / f"encoder-{step:08d}.pt"

    def save(self, encoder: Encoder) -> None:
        """Write an encoder for the refresh job.

        Raises:
            OSError: writing failed, for example on a full disk.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.write(self.encoder(encoder.step), encoder)

    def failure(self, step: int) -> Path:
        """Path of the reason why the generation of a step could not be made."""
        return self.encoder(step).with_suffix(".failed")

    def why_failed(self, step: int) -> str:
        """Why the generation of a step could not be made; "" if it did not fail."""
        try:
            return self.failure(step).read_text().strip()
        except FileNotFoundError:
            return ""

    def generation(self, step: int) -> Path:
        """Path of the generation of a step."""
        return generation_path(self.path, step)

    def encoders(self) -> list[int]:
        """Steps of the encoders in the folder, in order."""
        paths = self.path.glob("encoder-*.pt")
        return sorted(int(each.stem.removeprefix("encoder-")) for each in paths)

    def due(self) -> int | None:
        """The step of the newest encoder, unless its generation exists."""
        newest = max(self.encoders(), default=None)
        return None if newest is None or self.generation(newest).exists() else newest

    def remove_encoders(self, up_to: int | None = None) -> None:
        """Remove encoders whose generation is no longer wanted: up to a step, or all."""
        for step in self.encoders():
            if up_to is None or step <= up_to:
                self.encoder(step).unlink(missing_ok=True)
                self.failure(step).unlink(missing_ok=True)

    def finish(self) -> None:
        """Signal that no encoder will follow."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.remove_encoders()
        self.finished.touch()

    @contextmanager
    def followed(self) -> Iterator[int]:
        """While open, `is_followed` holds.

        Yields:
            a file descriptor; `is_followed` also holds while a process that inherited it lives.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "a+") as held:
            fcntl.flock(held, fcntl.LOCK_SH)  # several jobs may follow one run
            yield held.fileno()

    def is_followed(self) -> bool:
        """Whether a job follows the run; the kernel releases the lock of a killed one."""
        try:
            with open(self._lock, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


class Epochs:
    """At which step and with which generation each epoch started; kept in `epochs.json`.

    Args:
        folder: of the run.
        run: its id; records of another run are dropped.

    Attributes:
        new: whether there was no file of this run.

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
                f"{self._path} is damaged; remove it to resume with the newest generations"
            ) from None

    def at(self, epoch: int) -> tuple[bool, int | None]:
        """Whether that epoch started before, and with which generation."""
        return epoch in self._begun, self._begun.get(epoch, (0, None))[1]

    def generations_since(self, step: int) -> set[int]:
        """Generations of the epoch that a step ends or lies in, and of later epochs."""
        first = max((at for at, _ in self._begun.values() if at < step), default=0)
        return {each for at, each in self._begun.values() if at >= first and each is not None}

    def forget_from(self, epoch: int) -> None:
        """Drop the records of an epoch and those after it."""
        self._begun = {each: begun for each, begun in self._begun.items() if each < epoch}

    def write(self, epoch: int, step: int, generation: int | None) -> None:
        """Record the generation that an epoch starts with."""
        self._begun[epoch] = step, generation
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path) as file:
            file.write(json.dumps({"run": self._run, "epochs": self._begun}).encode())
