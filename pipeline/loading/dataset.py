"""A data set in memory: the samples of its shards, and their score maps, a row for each image."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.manifest import ShardRecord
from famt.pipeline.caching.validity import look_up
from famt.pipeline.errors import CacheError
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.judge import judge_shards
from famt.pipeline.sharding.dataset_json import require_one_split
from famt.pipeline.sharding.patterns import expand_shards
from famt.pipeline.storage import each_at_once


@dataclass(frozen=True)
class SampleTable:
    """All samples of a set of shards; row r is the same image in all arrays and in maps.

    Attributes:
        patterns: of the shards, as the user gave them.
        urls: of the shards, in the order of rows.
        paths: where their bytes are read: their URLs, or their staged copies.
        labels: `[R]` int64, -1 where a sample has none.
        first_row: `[S + 1]`; rows of shard s are `first_row[s] : first_row[s + 1]`.
        shard_ids: content id of each shard.
    """

    patterns: list[str]
    urls: list[str]
    paths: list[str]
    labels: Tensor
    first_row: list[int]
    shard_ids: list[str]
    _places: Tensor
    _cache: ScoreCache

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> list[int]:
        """Number of rows of each shard."""
        return [end - first for first, end in itertools.pairwise(self.first_row)]

    @cached_property
    def digest(self) -> str:
        """Hash of the samples in their order: equal digests mean equal rows."""
        digest = hashlib.sha256(" ".join(self.shard_ids).encode())
        digest.update(self._places.numpy().data)
        return digest.hexdigest()[:12]

    def keys(self, shard: int) -> list[str]:
        """Sample keys of a shard, by its number, in the order of rows."""
        return self._cache.read_table(self.shard_ids[shard]).key

    def key(self, row: int) -> str:
        """`<url>:<sample key>` of a row, to name a sample in an error or a log."""
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return f"{self.urls[shard]}:{self.keys(shard)[row - self.first_row[shard]]}"

    def left_out(self) -> list[str]:
        """`<url>:<key>: <reason>` of every quarantined image."""
        tables = each_at_once(self._cache.read_table, self.shard_ids)
        return [
            f"{url}:{bad.key}: {bad.reason}"
            for url, table in zip(self.urls, tables, strict=True)
            for bad in table.rejected
        ]

    def judge_again(self) -> str:
        """The command that judges the images of these shards again."""
        return _score_command(self.patterns, self._cache, ScoreSpec(), "--retry-bad")

    def shards_of(self, rows: range) -> list[int]:
        """Numbers of the shards that consecutive rows lie in."""
        return list(self._parts(rows))

    def write_indices(self, folder: Path, rows: range) -> list[int]:
        """Write DALI's index of consecutive rows: `<number>.idx` for each of `shards_of(rows)`.

        DALI returns a sample's name with its data, so the name holds the sample's row.

        Returns:
            `shards_of(rows)`.
        """
        parts = self._parts(rows)
        for number, own in parts.items():
            places = self._places[own.start : own.stop].tolist()
            samples = [
                f"jpg {at} {size} {row}" for row, (at, size) in zip(own, places, strict=True)
            ]
            lines = [f"v1.2 {len(samples)}", *samples, ""]
            (folder / f"{number}.idx").write_text("\n".join(lines))
        return list(parts)

    def _parts(self, rows: range) -> dict[int, range]:
        """The part of consecutive rows that each shard has, by its number, unless it has none."""
        parts = [
            range(max(first, rows.start), min(end, rows.stop))
            for first, end in itertools.pairwise(self.first_row)
        ]
        return {number: own for number, own in enumerate(parts) if own}


def load_samples(
    patterns: list[str], cache: ScoreCache, spec: ScoreSpec | None = None
) -> SampleTable:
    """Load the tables of shards from the cache; shards without one are judged first.

    Args:
        patterns: of shards; see `expand_shards`.
        spec: a score that the caller will load. A shard without it is an error. A tar that was
            copied or touched is hashed; nothing is judged. None judges unknown shards.

    Raises:
        CacheError: a shard is gone, can't be read, or lacks maps of `spec`. Names the first such
            shard, the reason, the number of others, and the command that repairs it. Or no sample
            is left.
        FileNotFoundError: a pattern that matches nothing.
        UserError: see `famt.pipeline.sharding.dataset_json.require_one_split`.
    """
    require_one_split(patterns)
    urls = expand_shards(patterns)
    records = _require_shards(patterns, urls, cache, spec)
    ids = [records[url].shard_id for url in urls]
    parts = each_at_once(cache.read_samples, ids)
    counts = [len(part) for part in parts]
    samples = np.concatenate(parts)
    if not len(samples):
        raise CacheError(f"{urls[0]}: every sample of the {len(urls)} shards is quarantined")
    return SampleTable(
        patterns=patterns,
        urls=urls,
        paths=urls,
        labels=torch.from_numpy(samples[:, 2].copy()),
        first_row=[0, *itertools.accumulate(counts)],
        shard_ids=ids,
        _places=torch.from_numpy(samples[:, :2].copy()),
        _cache=cache,
    )


def _require_shards(
    patterns: list[str], urls: list[str], cache: ScoreCache, spec: ScoreSpec | None
) -> dict[str, ShardRecord]:
    """Check that the cache has the current content of all shards; returns URL -> record."""
    shards = look_up(urls, cache, spec)
    mendable = {"record", "hash"} if spec else {"record", "hash", "table"}
    failed: dict[str, str] = {}
    if shards.stale and all(each.lacks in mendable for each in shards.stale.values()):
        failed = judge_shards(list(shards.stale), cache, known_only=spec is not None)
        shards = look_up(urls, cache, spec)
    if shards.stale:
        (url, first), *more = shards.stale.items()
        why = f" ({failed[url]})" if url in failed else ""
        others = f" (and {len(more)} more shards)" if more else ""
        command = _score_command(patterns, cache, spec or ScoreSpec())
        raise CacheError(f"{url}: {first.reason}{why}{others}. Remedy: {command}")
    return shards.records


def load_maps(samples: SampleTable, cache: ScoreCache, spec: ScoreSpec) -> Tensor:
    """The score maps of samples, `[R, G, G]` float16 with mean 1 an image.

    Raises:
        CacheError: a shard lacks maps of this spec, which `load_samples` finds at once.
    """
    maps = np.empty((len(samples), spec.grid, spec.grid), np.float16)

    def read(shard: int) -> None:
        first, end = samples.first_row[shard : shard + 2]
        found = cache.read_maps(samples.shard_ids[shard], spec)
        if len(found) != end - first:
            raise CacheError(
                f"{samples.urls[shard]}: {len(found)} maps of {spec.id} for {end - first} samples. "
                f"Remove {cache.url}/shards/{samples.shard_ids[shard]} and run `famt score` again"
            )
        maps[first:end] = found

    each_at_once(read, range(len(samples.urls)))
    return torch.from_numpy(maps)


def _score_command(patterns: list[str], cache: ScoreCache, spec: ScoreSpec, *flags: str) -> str:
    command = ["famt", "score", *flags, "--shards", *patterns, "--cache", cache.url]
    for field in dataclasses.fields(ScoreSpec):
        value = getattr(spec, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--spec.{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(command)
