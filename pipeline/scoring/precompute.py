"""Judge and score one shard: what a task of the Ray job does.

The tar is read once, for its hash, its table, all decodes and all scores.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from famt.pipeline import storage
from famt.pipeline.caching.cache import ScoreCache, ShardTable
from famt.pipeline.errors import UserError
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.decode import BadImage, decode
from famt.pipeline.sharding.shards import (
    Rejected,
    Sample,
    content_id,
    count_endings,
    judgement_ids,
    list_shard,
)

_BATCH = 128  # images scored in one call


class ShardScores(NamedTuple):
    """The table of a tar, and `maps [n, G, G]` float16 of the samples kept; none without a spec."""

    table: ShardTable
    maps: NDArray[np.float16]


@dataclass(frozen=True)
class ShardReport:
    """The result of `precompute_shard`.

    Attributes:
        version: size and stamp of the file when it was read.
        kept, quarantined: images of the tar; together all of them.
        decoded: images decoded now; 0 if the cache lacked nothing.
        damage, passed_over: as of `ShardTable`.
    """

    url: str
    shard_id: str
    version: storage.Version
    kept: int
    quarantined: int
    decoded: int
    damage: str | None
    passed_over: dict[str, int]


def precompute_shard(
    url: str,
    cache: ScoreCache,
    spec: ScoreSpec | None,
    *,
    retry_bad: bool = False,
    known_only: bool = False,
) -> ShardReport:
    """Put the table and the maps of the tar at `url` into the cache; compute only what is missing.

    Args:
        spec: which maps; None for the table alone.
        retry_bad: judge all images again with the decoders installed now. If other images enter
            training then, the tar gets a new entry, with maps of `spec` alone, since maps of the
            old entry follow other rows.
        known_only: refuse a tar whose content is not in the cache.

    Raises:
        OSError: the tar can't be read, or the cache can't be written.
        UserError: the file is no tar, was judged too often, or is refused.
    """
    data, content, version = _read(url)
    shard_id, free = _newest_entry(cache, content)
    # A stored table decides which samples there are, since stored maps follow its rows.
    table = cache.find_table(shard_id)
    if table is None and known_only:
        raise UserError("its content is new")
    decoded = 0
    if table is None or retry_bad or not cache.has(shard_id, spec):
        new, maps = score_shard(data, spec, url, None if retry_bad else table)
        decoded = new.kept
        if table is not None and not new.same_rows(table):
            shard_id, table = free, None
        table = table or new
        if spec is None:
            cache.write_table(shard_id, table)
        else:
            cache.write(shard_id, table, spec, maps)
    return ShardReport(
        url=url,
        shard_id=shard_id,
        version=version,
        kept=table.kept,
        quarantined=len(table.rejected),
        decoded=decoded,
        damage=table.damage,
        passed_over=table.passed_over,
    )


def _newest_entry(cache: ScoreCache, content: str) -> tuple[str, str]:
    """The id of the entry by a tar's newest judgement, and the id for the next judgement."""
    newest, *later = judgement_ids(content)
    for shard_id in later:
        if not cache.has(shard_id):
            return newest, shard_id
        newest = shard_id
    raise UserError(f"shard {content} was judged {len(later)} times; make another tar of it")


def _read(url: str) -> tuple[bytes, str, storage.Version]:
    """Bytes of a tar, their hash, and the state of the file."""
    before = storage.version(url)
    data = storage.read(url)
    if storage.version(url) != before or len(data) != before.size:
        raise OSError(f"{url} changed while it was read; run again when nothing writes to it")
    return data, content_id(data), before


def score_shard(
    data: bytes, spec: ScoreSpec | None, name: str = "tar", known: ShardTable | None = None
) -> ShardScores:
    """Decide which images of a tar in memory enter training, and score these.

    Args:
        spec: which score; None for none.
        name: of the tar, for errors.
        known: an earlier table of the same bytes; its samples alone are decoded.

    Raises:
        UserError: `data` is no tar or holds no image, or a sample of `known` no longer decodes.
        MemoryError: too little memory for one of the images.
    """
    if known is not None:
        rows = zip(known.key, known.samples.tolist(), strict=True)
        _, refused, maps = _score(data, [Sample(key, *row) for key, row in rows], spec)
        if refused:
            raise UserError(
                f"{name}: {refused[0].key} was kept before and does not decode now "
                f"({refused[0].reason}); judge the shard again with `famt score --retry-bad`"
            )
        return ShardScores(known, maps)
    listing = list_shard(data)
    if not listing.samples and not listing.rejected:
        others = f"; it holds {count_endings(listing.passed_over)}" * bool(listing.passed_over)
        raise UserError(f"{name}: no image in it ({listing.damage or 'the tar is whole'}{others})")
    kept, refused, maps = _score(data, listing.samples, spec)
    table = ShardTable(
        key=[sample.key for sample in kept],
        samples=np.array([(s.offset, s.size, s.label) for s in kept], np.int64).reshape(-1, 3),
        rejected=sorted([*listing.rejected, *refused], key=lambda bad: bad.key),
        bytes=len(data),
        damage=listing.damage,
        passed_over=listing.passed_over,
    )
    return ShardScores(table, maps)


def _score(
    data: bytes, samples: list[Sample], spec: ScoreSpec | None
) -> tuple[list[Sample], list[Rejected], NDArray[np.float16]]:
    """The samples of a tar that decode, those that do not, and the maps of the first."""
    kept: list[Sample] = []
    refused: list[Rejected] = []
    maps: list[torch.Tensor] = []
    batch: list[NDArray[np.uint8]] = []

    def score_batch() -> None:
        if spec and batch:
            maps.append(spec.score(torch.from_numpy(np.stack(batch))))
        batch.clear()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that does no harm
        for sample in samples:
            image = data[sample.offset : sample.offset + sample.size]
            try:
                batch.append(decode(image, spec.size if spec else 1))
            except BadImage as error:
                refused.append(Rejected(sample.key, str(error)))
                continue
            kept.append(sample)
            if len(batch) == _BATCH:
                score_batch()
    score_batch()
    grid = spec.grid if spec else 1
    stacked = torch.cat(maps) if maps else torch.empty(0, grid, grid)
    return kept, refused, stacked.to(torch.float16).numpy()
