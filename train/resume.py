"""Who trains in a run's folder, and the checkpoint that a run goes on from."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, Since, annotated, flat
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint
from famt.train.distributed import Ranks
from famt.train.log import write_event

_SEEN_WITHIN = 120.0  # seconds; NFS clients may keep an old listing for one minute

# Circumstances that may differ from the beginning of an epoch, as options do that are `ELASTIC`.
_ELASTIC_CIRCUMSTANCES = ("data", "world_size")


class BusyError(UserError):
    """Another process trains in a run's folder; it may be about to end."""


class Options(Protocol):
    """What `resume` asks of a run's options: a dataclass with notes beside them."""

    @property
    def out(self) -> Path: ...
    @property
    def resume(self) -> Literal["auto", "never"]: ...
    @property
    def elastic(self) -> bool: ...
    def describe(self) -> dict[str, Any]: ...


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a run's folder, and keep other processes from training in it meanwhile.

    What a killed run left half written in it is removed, and so is a folder in which nothing came
    to be.

    Raises:
        ValueError: another process trains in it (`BusyError`), or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out {folder} is a file; give a folder") from None
    with open(folder / "lock", "a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise BusyError(
                f"{folder} is in use by {held.read().strip() or 'another run'}; wait for it, or "
                "give another --out"
            ) from None
        held.truncate(0)
        held.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        held.flush()
        for place in (folder, folder / "refresh"):
            for partial in place.glob("*.partial"):  # of a writer that was killed
                partial.unlink()
        try:
            yield
        finally:
            if os.listdir(folder) == ["lock"]:  # it failed before it began
                (folder / "lock").unlink()
                folder.rmdir()


def resume(
    config: Options,
    circumstances: dict[str, object],
    ranks: Ranks,
    lost: Callable[[Checkpoint], list[str]] = lambda _: [],
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint that a run goes on from, if there is one, and whether with the next batch.

    The main rank alone chooses it, the latest whose bytes are those that were written; the others
    wait until they see it. Every rank calls this.

    Args:
        config: of the run now.
        circumstances: what else must be as it was: device, world size, data.
        ranks: this rank among those of the run.
        lost: names what an exact continuation of a checkpoint needs and does not find any more; the
            main rank alone calls it.

    Returns:
        the checkpoint or None, and False if it must go back to the beginning of the epoch.

    Raises:
        ValueError: the folder's run is another one, or may not be gone on with; all of its
            checkpoints are damaged; or a machine does not see the folder.
    """
    found = ranks.from_main(lambda: _choose(config.out))
    _wait_to_see(config.out, found, ranks)
    if found is None:
        return None, True
    if config.resume == "never":
        raise UserError(f"{found} is there; --resume never wants a folder without checkpoints")
    resumed = checkpoint.load(found, verified=ranks.is_main)
    then, now = flat(resumed.config), flat({**config.describe(), **circumstances})
    notes = {name: beside for name, _, beside in annotated(config)}
    for name, beside in notes.items():
        for note in beside:
            if isinstance(note, Since):
                then.setdefault(name, note.before)
    notes |= dict.fromkeys(_ELASTIC_CIRCUMSTANCES, (ELASTIC,))
    differing = sorted(name for name in now if then.get(name) != now[name])
    changed = [name for name in differing if FREE not in notes.get(name, ())]
    harmless = all(ELASTIC in notes.get(name, ()) for name in changed)
    if config.elastic and changed and harmless:
        return resumed, False
    if not changed:
        gone = ranks.from_main(lambda: lost(resumed))
        if gone and not config.elastic:
            raise UserError(
                f"{found} can't be gone on from exactly without {', '.join(gone)}; --elastic goes "
                "on from the beginning of the epoch with what is there"
            )
        return resumed, not gone
    differences = "; ".join(f"{each}: {then.get(each)} -> {now[each]}" for each in changed)
    remedy = "use the same, or another --out"
    if harmless:
        remedy += ", or --elastic to go on from the beginning of the epoch"
    raise UserError(f"{found} belongs to a run with other options ({differences}); {remedy}")


def _choose(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; those after it are set aside as `*.damaged`."""
    damaged: list[Path] = []
    for path in reversed(checkpoint.files(folder)):
        why = checkpoint.damage_of(path)
        if why is None:
            for each in damaged:
                aside = each.rename(each.with_suffix(".damaged"))
                told = {"file": aside.name, "going_on_from": path.name}
                write_event(folder, checkpoint.step_of(path), "damaged checkpoint", **told)
                print(f"{each} is damaged; going on from {path.name}", file=sys.stderr)
            return path
        damaged.append(path)
    if damaged:
        raise checkpoint.DamagedError(
            f"{damaged[0]} is damaged and no whole checkpoint is before it; remove it to begin anew"
        )
    return None


def _wait_to_see(folder: Path, chosen: Path | None, ranks: Ranks) -> None:
    """Wait until every rank sees what the main one sees in a run's folder.

    Raises:
        ValueError: one does not, after two minutes.
    """
    files = [folder / "lock", *([chosen] if chosen else [])]

    def look() -> list[tuple[Path, int]]:
        # A listing makes clients of network file systems ask their server.
        names = {each.name for each in os.scandir(folder)} if folder.is_dir() else set()
        return [(each, each.stat().st_size) for each in files if each.name in names]

    mains = ranks.from_main(look)
    until = time.monotonic() + _SEEN_WITHIN
    while not (same := look() == mains) and time.monotonic() < until:
        time.sleep(0.1)
    blind = sorted({node for node, sees in ranks.gather((ranks.node, same)) if not sees})
    if blind:
        raise UserError(
            f"{files[-1]} was not seen on {', '.join(blind)} within {_SEEN_WITHIN:.0f} s; --out "
            "must be a folder on a file system that all machines of the run share"
        )
