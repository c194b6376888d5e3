"""Which epoch of a run began with which generation of maps, so that a resumed run repeats it."""

from __future__ import annotations

import json
from pathlib import Path

from famt.pipeline.errors import UserError
from famt.train.files import written_whole


class Record:
    """Which epochs of a run began at which step with which generation, in a file.

    Args:
        path: of the file; what it tells of another run is forgotten.
        run: id of the run.

    Attributes:
        new: no file of this run was there.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run
        self._epochs: dict[str, tuple[int, int | None]] = {}
        try:
            found = json.loads(path.read_text())
            self.new = found["run"] != run
            self._epochs = {} if self.new else found["epochs"]
        except FileNotFoundError:
            self.new = True
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{path} is damaged; remove it, and the run goes on with the newest generations"
            ) from None

    def at(self, epoch: int) -> tuple[bool, int | None]:
        """Whether that epoch began before, and with which generation."""
        known = self._epochs.get(str(epoch))
        return (True, known[1]) if known else (False, None)

    def since(self, step: int) -> set[int | None]:
        """Generations of the epoch that ends with a step or is in it, and of later ones."""
        begun = [at for at, _ in self._epochs.values() if at < step]
        first = max(begun, default=0)
        return {generation for at, generation in self._epochs.values() if at >= first}

    def forget_from(self, epoch: int) -> None:
        """Drop what is known of an epoch and those after it."""
        self._epochs = {each: known for each, known in self._epochs.items() if int(each) < epoch}

    def write(self, epoch: int, step: int, generation: int | None) -> None:
        """Write down with which generation an epoch begins."""
        self._epochs[str(epoch)] = (step, generation)
        with written_whole(self._path) as file:
            file.write(json.dumps({"run": self._run, "epochs": self._epochs}).encode())
