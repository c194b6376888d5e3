"""The loader: crops of the shards' images, epoch by epoch, with an exact state to resume from.

Crops stay interleaved uint8: patches are gathered before anything becomes float, so the pixels of
thrown patches cost no arithmetic.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from famt.device_copies import send
from famt.pipeline import storage
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.loading.dali_graphs import build_pipeline, crop_graph, rows_of
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.options import LoaderConfig
from famt.pipeline.wording import counted

_PAUSES = (1.0, 4.0, 16.0, 60.0)  # seconds before each new attempt to read from a store that failed
_PREFETCHED = 2  # batches


@dataclasses.dataclass(frozen=True)
class Views:
    """Which parts of which images a batch shows; attributes as of `CropBatch`."""

    rows: Tensor
    windows: Tensor
    flips: Tensor

    def take(self, index: Tensor | slice) -> Views:
        """The views at positions `index`, int64 or bool on the CPU."""
        return Views(self.rows[index], self.windows[index], self.flips[index])


@dataclasses.dataclass(frozen=True)
class CropBatch:
    """Crops and where they come from.

    Attributes:
        images: `[B, S, S, 3]` uint8 on the training device. On a GPU, valid in the stream that was
            current when the batch was taken; copy them for another one.
        rows: `[B]` int64 on the CPU, the image's row in the `SampleTable`; several crops of one
            image are adjacent.
        windows: `[B, 4]` float32 on the CPU: top, left, height, width of the crop in fractions of
            the upright image.
        flips: `[B]` bool on the CPU, mirrored left to right.
    """

    images: Tensor
    rows: Tensor
    windows: Tensor
    flips: Tensor

    @property
    def views(self) -> Views:
        """Where the crops come from, without their pixels."""
        return Views(self.rows, self.windows, self.flips)

    def first(self, count: int) -> CropBatch:
        """The first `count` crops."""
        return CropBatch(*(part[:count] for part in vars(self).values()))

    def take(self, index: Tensor) -> CropBatch:
        """The crops at positions `index`, int64 on the CPU."""
        images = self.images[send(index, self.images.device)]
        return CropBatch(images, self.rows[index], self.windows[index], self.flips[index])


def own_share(samples: int, rank: int, world_size: int) -> range:
    """The rows that a rank reads. The shares of any two ranks differ by at most one row."""
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


class CropLoader:
    """Iterates over crops of a table's samples, an epoch at a time.

    Each rank reads the same consecutive rows in every epoch and opens only the tars that hold them.
    With `drop_last` every rank yields the same number of full batches an epoch. Together they skip
    `remainder` samples, which change from epoch to epoch if shuffled. Without `drop_last` a rank
    decodes every sample of its share exactly once, and the last batch may be smaller.

    Args:
        drop_last: True for training, False for evaluation.
        rank, world_size: this process among those that share the epoch.
        device: where crops end up; "cuda" decodes large ones there.
        seed: of shuffle, crops and flips, equal on all ranks; each rank draws its own.
        first_epoch: number of epochs counted as done; each has its own shuffle and crops.

    Attributes:
        rows: the table's rows that this rank reads.
        steps_per_epoch: batches that this rank yields an epoch.
        remainder: samples of all ranks that an epoch skips.
        epoch, step: epochs done, and batches of the current one.

    Raises:
        UserError: fewer samples than one batch on every rank.
    """

    def __init__(
        self,
        table: SampleTable,
        config: LoaderConfig,
        *,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
        first_epoch: int = 0,
    ) -> None:
        self.config, self.drop_last = config, drop_last
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self._table = table
        self._seed, self._first_epoch = seed, first_epoch
        images, least = config.images_per_batch, len(table) // world_size
        if least < (images if drop_last else 1):
            raise UserError(
                f"{counted(len(table), 'image')} over {counted(world_size, 'rank')} make no batch "
                f"of {images}; lower --batch-size"
            )
        self.rows = own_share(len(table), rank, world_size)
        self._runs = -(-len(self.rows) // images)
        self.steps_per_epoch = least // images if drop_last else self._runs
        self.remainder = len(table) - self.steps_per_epoch * images * world_size if drop_last else 0
        self.epoch, self.step = first_epoch, 0
        self._remote = any(storage.is_remote(table.paths[n]) for n in table.shards_of(self.rows))
        self._checkpoint: bytes | None = None
        self._pipeline: Pipeline | None = None  # built when it is first read from

    def __iter__(self) -> Iterator[CropBatch]:
        """The rest of the current epoch."""
        while self.step < self.steps_per_epoch:
            batch = self._run()
            self.step += 1
            images = self.config.images_per_batch
            valid = len(self.rows) - (self.step - 1) * images
            # DALI pads the last batch by repeating a sample.
            yield batch if valid >= images else batch.first(valid * self.config.crops_per_image)
        for _ in range(self._runs - self.steps_per_epoch):
            self._run_graph()
        self.epoch, self.step = self.epoch + 1, 0

    def _build(self) -> Pipeline:
        """A pipeline that continues from the last checkpoint."""
        # Ranks, and runs that begin at another epoch, must not draw the same crops.
        seed = np.random.SeedSequence([self._seed, self._first_epoch, self.rank])
        return build_pipeline(
            crop_graph,
            self._table,
            self.rows,
            self.config,
            self.device,
            batch_size=self.config.images_per_batch,
            seed=int(seed.generate_state(1)[0]),
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
            prefetch_queue_depth=_PREFETCHED,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a loader needs to continue after the last batch yielded."""
        return {
            "setup": self._setup,
            "first_epoch": self._first_epoch,
            "epoch": self.epoch,
            "step": self.step,
            "dali": self._pipeline.checkpoint() if self._pipeline else self._checkpoint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the very next batch, in a loader that was not read from yet; a UserError if
        the state is of another set-up."""
        if state["setup"] != self._setup:
            raise UserError(
                "the loader's state belongs to other shards, another batch size, view, seed "
                f"or world size: {state['setup']} then, {self._setup} now"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self._first_epoch, self._checkpoint = state["first_epoch"], state["dali"]

    def _run(self) -> CropBatch:
        source, anchor, shape, extent, flip, *pixels = self._run_graph()
        crops = self.config.crops_per_image
        # Axes: images, crops of each, then values.
        size = torch.from_numpy(extent.as_array()).double()[:, None]
        top_left = torch.from_numpy(anchor.as_array()).double() / size
        height_width = torch.from_numpy(shape.as_array()).double() / size
        views = Views(
            rows=rows_of(source).repeat_interleave(crops),
            windows=torch.cat([top_left, height_width], dim=2).flatten(0, 1).float(),
            flips=torch.from_numpy(flip.as_array().astype(bool)).flatten(),
        )
        return CropBatch(self._pixels(views, *pixels), **vars(views))

    def _pixels(self, views: Views, decoded: TensorListCPU | TensorListGPU) -> Tensor:
        """Crops `[B, S, S, 3]` uint8 on the device."""
        return from_dlpack(decoded.as_tensor()).flatten(0, 1)

    def _run_graph(self) -> tuple:
        """Outputs of the graph's next run.

        A failed read ends a DALI pipeline. On remote shards a new one continues from the checkpoint
        taken after the last run, so no sample is lost or repeated.

        Raises:
            CacheError: an image can't be decoded.
            OSError: a local tar is gone or changed, or the store failed at every attempt.
        """
        for pause in (*_PAUSES, None):
            try:
                self._pipeline = self._pipeline or self._build()
                outputs: tuple = self._pipeline.run(self._stream())
                if self._remote:
                    self._checkpoint = self._pipeline.checkpoint()
                return outputs
            except RuntimeError as error:
                self._explain(error)
                # A failure while a checkpoint is restored does not name the operator.
                if not self._remote or (self._pipeline and "readers.webdataset" not in str(error)):
                    raise
                problem = f"{self._read_now()}: the store failed ({_reason(error)})"
                if pause is None:
                    raise OSError(
                        f"{problem}, {len(_PAUSES) + 1} times in a row. Run again to go on from "
                        "the last checkpoint; with --stage <folder> tars are copied to a local disk"
                    ) from error
            self._pipeline = None
            print(f"{problem}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _stream(self) -> torch.cuda.Stream | None:
        """The stream in which a GPU's batches are read.

        DALI lets that stream wait for the pixels; without it, the host would wait. It keeps memory
        that DLPack shares until the GPU has done all work queued before Python drops it.
        """
        on_gpu = self.device.type == "cuda"
        return torch.cuda.current_stream(self.device) if on_gpu else None

    def _read_now(self) -> str:
        """Path of the tar being read, or of the first of those that may be."""
        images = self.config.images_per_batch
        first = self.rows.start + self.step * images
        end = first + self.config.shuffle_buffer + (1 + _PREFETCHED) * images
        # Past the end of its rows the reader is in the next epoch.
        rows = range(first, end) if end <= self.rows.stop else self.rows
        shards = self._table.shards_of(rows)
        others = f", or another of {len(shards)} tars" if shards[1:] else ""
        return f"{self._table.paths[shards[0]]}{others}"

    def _explain(self, error: RuntimeError) -> None:
        """Raise a CacheError if DALI failed on an image, an OSError if it failed on a local tar;
        only failed decodes name the image's row."""
        decoding = re.search(r"Failed to decode sample #\d+ : .*:(\d+)$", str(error), re.M)
        if decoding is None and "nvImageCodec failure" not in str(error):
            if self._remote or "readers.webdataset" not in str(error):
                return
            raise OSError(
                f"{self._read_now()}: moved or changed while it was read ({_reason(error)}); put "
                "back what was scored, and run again to go on from the last checkpoint"
            ) from error
        sample = self._table.key(int(decoding[1])) if decoding else "an image of these shards"
        raise CacheError(
            f"{sample}: DALI can't decode it, though it could when its shard was scored: the tar "
            "was overwritten, or the decoders are of other versions. Remove the image from its "
            f"tar, or judge all images again: {self._table.judge_again()}"
        ) from error

    @property
    def _setup(self) -> str:
        """All that decides which sample comes next, spelled out.

        Of the view only what differs from the defaults, so that states outlive new options.
        """
        config, view = self.config, self.config.view
        changed = [
            f"{each.name}={value}"
            for each in dataclasses.fields(view)
            if (value := getattr(view, each.name)) != each.default
        ]
        return (
            f"{self._table.digest} batch={config.batch_size} size={config.image_size} "
            f"view={type(view).__name__}({', '.join(changed)}) "
            f"interpolation={config.interpolation} "
            f"shuffle={config.shuffle_buffer} drop_last={self.drop_last} seed={self._seed} "
            f"rank={self.rank}/{self.world_size} crops={config.crops_per_image}"
            + (" resident" if config.resident else "")
        )


def _reason(error: RuntimeError) -> str:
    """DALI's reason for a failed read, without its description of the pipeline."""
    text = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    return text.strip(": \n").partition("\n")[0] or "no reason given"
