"""Copy tars of a slow store to a local disk, once for all runs of a machine.

A machine fetches only what its ranks read: the same consecutive rows in every epoch.

    <folder>/<shard id>.tar        a tar whose bytes were checked against that id
    <folder>/<shard id>.tar.part   the beginning of a tar; a later fetch continues at its end

Ranks and runs may share a folder: a lock on the part keeps two from fetching the same tar. Whole
tars are never deleted; remove the folder when it is no longer needed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import obstore
from blake3 import blake3
from obstore.exceptions import BaseError

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.progress import progress_bar
from famt.pipeline.sharding.shards import judgement_ids

_SIDE_BY_SIDE = 16
_CHUNK = 8 << 20  # bytes


def stage_shards(
    samples: SampleTable,
    cache: ScoreCache,
    folder: Path | None,
    parts: Sequence[range] | None = None,
    *,
    show: bool = False,
) -> SampleTable:
    """Fetch the shards of `samples` that this machine reads and lacks.

    Args:
        cache: has the sizes of the shards.
        folder: on a local disk; made if it does not exist. None to read shards where they are.
        parts: rows that the ranks of this machine read; all if left out.
        show: a progress bar.

    Returns:
        the same samples, with paths of the staged tars.

    Raises:
        CacheError: a tar's bytes are not those that were scored.
        FileNotFoundError: a tar is gone.
        OSError: the disk is too small, or a store or disk is out of reach.
    """
    if folder is None:
        return samples
    folder.mkdir(parents=True, exist_ok=True)
    parts = [range(len(samples))] if parts is None else parts
    shards = sorted({shard for rows in parts for shard in samples.shards_of(rows)})
    records = cache.manifests.lookup([samples.urls[shard] for shard in shards])
    wanted = {}
    for shard in shards:
        url, shard_id = samples.urls[shard], samples.shard_ids[shard]
        size = records[url].version.size
        wanted[shard] = _Staged(url, shard_id, size, folder / f"{shard_id}.tar")
    lacking = list({each.path: each for each in wanted.values() if not each.is_there()}.values())
    _check_room(folder, lacking)
    total, left = (sum(each.size for each in some) for some in (wanted.values(), lacking))
    bar = progress_bar(
        desc=f"staging {len(lacking)} of {len(wanted)} tars",
        total=total,
        initial=total - left,
        unit="B",
        unit_scale=True,
        disable=not show or not lacking,
    )
    with bar:
        _fetch_all(lacking, bar.update)
    paths = [*samples.paths]
    for shard, each in wanted.items():
        paths[shard] = str(each.path)
    return dataclasses.replace(samples, paths=paths)


@dataclass(frozen=True)
class _Staged:
    """A tar to stage: its URL, id and bytes, and the path of its copy."""

    url: str
    shard_id: str
    size: int
    path: Path

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def is_there(self) -> bool:
        return _size(self.path) == self.size

    def fetch(self, progress: Callable[[int], object], *, wait: bool) -> bool:
        """Fetch the tar unless it is there; False if another process does, and not `wait`."""
        part = _open_locked(self.part, wait=wait)
        if part is None:
            return False
        with part:
            if self.is_there():  # fetched while this process waited
                self.part.unlink()
                progress(self.size)
                return True
            begun = os.fstat(part.fileno()).st_size > 0
            whole = self._complete(part, progress)
            if begun and not whole:
                # A crash of the machine may have left zeros in place of bytes not yet on disk.
                part.truncate(0)
                whole = self._complete(part, lambda _: None)
            if not whole:
                self.part.unlink()
                raise CacheError(
                    f"{self.url}: its bytes are not those that were scored (shard "
                    f"{self.shard_id}); run `famt score` over it again"
                )
            os.fsync(part.fileno())
            os.replace(self.part, self.path)
        return True

    def _complete(self, part: BinaryIO, progress: Callable[[int], object]) -> bool:
        """Append the missing bytes to the part; returns whether it now equals the tar."""
        digest = blake3()
        part.seek(0)
        while chunk := part.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
        there = part.tell()
        if there < self.size:
            place, name = storage.split_url(self.url)
            try:
                rest = obstore.get(
                    storage.open_store(place), name, options={"range": {"offset": there}}
                )
                for received in rest.stream(min_chunk_size=_CHUNK):
                    digest.update(received)
                    part.write(received)
                    progress(len(received))
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.url}: no such file") from None
            except BaseError as error:
                raise OSError(f"{self.url} can't be read: {storage.reason(error)}") from error
            part.flush()
        return self.shard_id in judgement_ids(digest.hexdigest(length=16))


def _open_locked(path: Path, *, wait: bool) -> BinaryIO | None:
    """Open and lock a file, made if it does not exist; None if another process has the lock."""
    while True:
        file = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The last holder of the lock may have renamed or removed the file.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()


def _fetch_all(staged: Sequence[_Staged], progress: Callable[[int], object]) -> None:
    """Fetch in threads, last of all what other processes are fetching."""
    pool = ThreadPoolExecutor(_SIDE_BY_SIDE)
    try:
        for wait in (False, True):
            done = pool.map(partial(_Staged.fetch, progress=progress, wait=wait), staged)
            staged = [each for each, fetched in zip(staged, done, strict=True) if not fetched]
    finally:
        pool.shutdown(cancel_futures=True)


def _check_room(folder: Path, lacking: Sequence[_Staged]) -> None:
    free = shutil.disk_usage(folder).free  # read first, since other ranks are fetching
    needed = sum(each.size - _size(each.part) for each in lacking if not each.is_there())
    if needed > free:
        raise OSError(
            f"{folder}: {len(lacking)} tars that are not there yet need {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; name a folder on a larger disk, or make smaller shards "
            "(famt shards --encoding.max-side)"
        )


def _size(path: Path) -> int:
    """Bytes of a file; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
