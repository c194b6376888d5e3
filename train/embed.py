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

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

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
from famt.train.distributed import allow_tf32, join_ranks
from famt.train.evaluate.features import Images, open_images, pool
from famt.train.initial import build_initial_encoder
from famt.train.program_options import Embed
from famt.train.run_folder import appearing

_ROW_GROUP = 4096  # images per row group, which are in memory at once

Batch = tuple[NDArray[np.float32], NDArray[np.float32]]
"""class tokens and means of patches, `[K, C]` each"""


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
    allow_tf32()
    with join_ranks(args.device) as ranks:
        images = open_images(args, encoder, "shards", ranks)
        table, images = images.table, replace(images, name="features")
        write = _write_parquet if args.out.suffix == ".parquet" else _write_arrays
        with appearing(args.out) as path:
            features = _features(encoder.to(ranks.device).eval(), images)
            write(path, table, encoder.embed_dim, features)
    print(
        f"{args.out}: {counted(len(table), 'image')} of {counted(len(table.urls), 'shard')}, "
        f"{encoder.embed_dim} values each; left out, as they can't be decoded: "
        f"{len(table.left_out())}"
    )


def _features(encoder: VisionTransformer, images: Images) -> Iterator[Batch]:
    """Features of all images, in row order."""
    next_row = 0
    with torch.inference_mode():
        for crops in images.crops():
            if crops.rows.tolist() != list(range(next_row, next_row + len(crops.rows))):
                raise RuntimeError(f"images came out of order after row {next_row}")
            tokens = encoder.forward_features(normalise_images(crops.images)).float()
            cls, mean = pool(encoder, tokens)
            yield cls.cpu().numpy(), mean.cpu().numpy()
            next_row += len(crops.rows)


def _write_parquet(path: Path, table: SampleTable, width: int, batches: Iterable[Batch]) -> None:
    features = pa.list_(pa.float32(), width)
    schema = pa.schema(
        {
            "shard": pa.string(),
            "key": pa.string(),
            "label": pa.int64(),
            "cls": features,
            "mean": features,
        }
    )
    names, row = _names(table), 0
    with pq.ParquetWriter(path, schema, use_dictionary=["shard"]) as file:
        for group in _row_groups(batches):
            count = len(group[0])
            shards, keys = zip(*itertools.islice(names, count), strict=True)
            labels = table.labels[row : row + count].numpy()
            row += count
            columns = [
                pa.array(shards),
                pa.array(keys),
                pa.array(labels, mask=labels < 0),
                *(pa.FixedSizeListArray.from_arrays(part.ravel(), width) for part in group),
            ]
            file.write_table(pa.Table.from_arrays(columns, schema=schema))


def _row_groups(batches: Iterable[Batch]) -> Iterator[list[NDArray[np.float32]]]:
    """Batches joined to groups of at least `_ROW_GROUP` rows, the last one of what is left."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(cls) for cls, _ in waiting) >= _ROW_GROUP:
            yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
            waiting.clear()
    if waiting:
        yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]


def _write_arrays(path: Path, table: SampleTable, width: int, batches: Iterable[Batch]) -> None:
    path.mkdir()
    arrays = [
        np.lib.format.open_memmap(path / name, "w+", np.float32, (len(table), width))
        for name in ("cls.npy", "mean.npy")
    ]
    np.save(path / "labels.npy", table.labels.numpy())
    with open(path / "keys.txt", "w") as file:
        file.writelines(f"{shard}:{key}\n" for shard, key in _names(table))
    row = 0
    for batch in batches:
        for array, part in zip(arrays, batch, strict=True):
            array[row : row + len(part)] = part
        row += len(batch[0])
    for array in arrays:
        array.flush()


def _names(table: SampleTable) -> Iterator[tuple[str, str]]:
    """Shard and key of each row; holds the keys of one shard at a time."""
    for number, url in enumerate(table.urls):
        yield from ((url, key) for key in table.keys(number))


if __name__ == "__main__":
    run_program(main, parsed(Embed, __doc__))
