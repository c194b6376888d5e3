"""Writes features of all images of some shards, with keys and labels, to Parquet or NumPy.

    famt embed --checkpoint runs/first --cache scores \\
        --shards 'shards/val-*.tar' --out features.parquet
    famt embed --checkpoint exported --cache scores --shards shards --out features

If --out ends in .parquet, it becomes a Parquet file with the columns shard, key, label (null for
unlabelled images), cls and mean: class token and mean of the patch tokens after the last norm,
float32. Otherwise it becomes a folder with cls.npy, mean.npy, labels.npy (-1 for unlabelled images)
and keys.txt, one line `<shard>:<key>` per image. Rows are in the order of the shards, and of the
images in each. Features are written as they are computed; --out appears once it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

from famt.patches import normalise_images
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.wording import counted
from famt.train import checkpoint
from famt.train.command_line import parsed, run_program
from famt.train.distributed import join_ranks
from famt.train.evaluate.features import Images, open_images, pool
from famt.train.initial import build_initial_encoder
from famt.train.program_options import Embed

_ROW_GROUP = 4096  # images per row group, which are in memory at once


def main(args: Embed) -> None:
    """Write the features of all images.

    Raises:
        UserError: --out exists, or --checkpoint has no encoder.
        CacheError: a shard can't be read.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("embedding runs in one process; start it without torchrun")
    if args.out.exists():
        raise UserError(f"--out {args.out} exists already; give a new name")
    encoder = (
        checkpoint.load_classifier(Path(args.checkpoint), ema=args.ema)
        if checkpoint.is_finetuned(args.checkpoint)
        else build_initial_encoder(args.checkpoint, ema=args.ema)
    )
    with join_ranks(args.device) as ranks:
        images = open_images(args, encoder, "shards", ranks)
        table, images = images.table, replace(images, name="features")
        with _open(args.out, table, encoder.embed_dim) as writer:
            for first, cls, mean in _features(encoder.to(ranks.device).eval(), images):
                writer.write(first, cls, mean)
    print(
        f"{args.out}: {counted(len(table), 'image')} of {counted(len(table.urls), 'shard')}, "
        f"{encoder.embed_dim} values each; left out, as they can't be decoded: "
        f"{len(table.left_out())}"
    )


def _features(
    encoder: VisionTransformer, images: Images
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """First row, class tokens and patch means `[K, C]` of each batch, in row order."""
    next_row = 0
    with torch.inference_mode():
        for crops in images.crops():
            if crops.rows.tolist() != list(range(next_row, next_row + len(crops.rows))):
                raise RuntimeError(f"images came out of order after row {next_row}")
            tokens = encoder.forward_features(normalise_images(crops.images)).float()
            cls, mean = pool(encoder, tokens)
            yield next_row, cls.cpu().numpy(), mean.cpu().numpy()
            next_row += len(crops.rows)


class _Writer(Protocol):
    """Takes batches of rows, in order."""

    def write(self, first: int, cls: NDArray[np.float32], mean: NDArray[np.float32]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def _open(out: Path, table: SampleTable, width: int) -> Iterator[_Writer]:
    """A writer to `out`, which appears once it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
    kind = _Parquet if out.suffix == ".parquet" else _Npy
    writer: _Writer = kind(partial, table, width)
    try:
        yield writer
    finally:
        writer.close()
    partial.rename(out)


class _Parquet:
    def __init__(self, path: Path, table: SampleTable, width: int) -> None:
        self._table, self._width = table, width
        features = pa.list_(pa.float32(), width)
        self._schema = pa.schema(
            {
                "shard": pa.string(),
                "key": pa.string(),
                "label": pa.int64(),
                "cls": features,
                "mean": features,
            }
        )
        self._file = pq.ParquetWriter(path, self._schema, use_dictionary=["shard"])
        self._names = _names(table)
        self._rows = 0
        self._waiting: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def write(self, first: int, cls: NDArray[np.float32], mean: NDArray[np.float32]) -> None:
        self._waiting.append((cls, mean))
        if sum(len(part) for part, _ in self._waiting) >= _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        cls, mean = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        names = [next(self._names) for _ in range(len(cls))]
        labels = self._table.labels[self._rows : self._rows + len(cls)].numpy()
        self._rows += len(cls)
        columns = [
            pa.array([shard for shard, _ in names]),
            pa.array([key for _, key in names]),
            pa.array(labels, mask=labels < 0),
            *(
                pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), self._width)
                for part in (cls, mean)
            ),
        ]
        self._file.write_table(pa.Table.from_arrays(columns, schema=self._schema))


class _Npy:
    def __init__(self, path: Path, table: SampleTable, width: int) -> None:
        path.mkdir()
        shape = (len(table), width)
        self._arrays = [
            np.lib.format.open_memmap(path / name, "w+", np.float32, shape)
            for name in ("cls.npy", "mean.npy")
        ]
        np.save(path / "labels.npy", table.labels.numpy())
        with open(path / "keys.txt", "w") as file:
            file.writelines(f"{shard}:{key}\n" for shard, key in _names(table))

    def write(self, first: int, cls: NDArray[np.float32], mean: NDArray[np.float32]) -> None:
        for array, part in zip(self._arrays, (cls, mean), strict=True):
            array[first : first + len(part)] = part

    def close(self) -> None:
        for array in self._arrays:
            array.flush()


def _names(table: SampleTable) -> Iterator[tuple[str, str]]:
    """Shard and key of each row; holds the keys of one shard at a time."""
    for number, url in enumerate(table.urls):
        yield from ((url, key) for key in table.keys(number))


if __name__ == "__main__":
    run_program(main, parsed(Embed, __doc__))
