"""The DALI graph: tar shards in, crops out, each with the row and the view it was cut by.

One graph serves CPU and GPU; on a GPU the JPEGs are decoded there (`mixed`). Images stay uint8 and
interleaved: patches are gathered before anything is made float: thrown pixels cost no arithmetic.

A CPU that cuts one crop from an image decodes that region alone. Everything else decodes images
whole and cuts while it resizes, once a crop.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from famt.pipeline import storage
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.limits import allow_open_files
from famt.pipeline.options import Checked
from famt.pipeline.table import SampleTable
from famt.transfer import send

Interpolation = Literal["bicubic", "bilinear"]
_INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_PAUSES = (1.0, 4.0, 16.0, 60.0)  # seconds before each new attempt to read from a store that failed
_PREFETCHED = 2  # batches


@dataclass(frozen=True)
class RandomView:
    """A random resized crop and flip, drawn as torchvision's RandomResizedCrop does."""

    area: Annotated[tuple[float, float], Gt(0), Le(1)] = (0.2, 1.0)
    """range of the crop's share of the image area"""
    aspect_ratio: Annotated[tuple[float, float], Gt(0)] = (3 / 4, 4 / 3)
    """range of the crop's width over height, before it is squashed to a square"""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """probability of a left-right flip"""

    def __post_init__(self) -> None:
        for name in ("area", "aspect_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{name} {low} {high} must be the smaller end, then the larger")


@dataclass(frozen=True)
class CentreView:
    """The central square, `fraction` of the image's shorter side."""

    fraction: Annotated[float, Gt(0), Le(1)] = 0.875


@dataclass(frozen=True)
class WholeView:
    """The whole image, squashed to a square."""


View = RandomView | CentreView | WholeView


def own_cores() -> int:
    """CPU cores of this machine that are this rank's share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@dataclass(frozen=True)
class DecodeConfig:
    """How images are decoded for a GPU; for a CPU nothing of it counts."""

    on: Literal["gpu", "cpu"] = "gpu"
    """where; on cpu the threads decode, and the GPU resizes what they send"""
    hardware_share: Annotated[float, Ge(0), Le(1)] = 0.65
    """share of a batch for the hardware decoder of a GPU that has one; the others are decoded by
    threads and CUDA cores, so more threads want a smaller share"""
    preallocate: Annotated[int, Ge(0)] = 0
    """side of images, px, that the hardware decoder gets memory for at the start; 0 lets it grow
    with the images"""


@dataclass(frozen=True)
class LoaderConfig(Checked):
    """How crops are read and cut."""

    batch_size: Annotated[int, Ge(1)] = 64
    """crops a step on this rank"""
    image_size: Annotated[int, Ge(1)] = 224
    """side of the square crops, px"""
    view: View = field(default_factory=RandomView)
    """which part of an image a crop shows"""
    interpolation: Interpolation = "bicubic"
    """how crops are resized, with antialiasing"""
    shuffle_buffer: Annotated[int, Ge(0)] = 4096
    """encoded samples held to draw from at random; 0 reads in shard order"""
    threads: Annotated[int | None, Ge(1)] = None
    """CPU threads that decode; a rank's share of the machine's cores if left out"""
    crops_per_image: Annotated[int, Ge(1)] = 1
    """crops of each image that is decoded, all in one batch; an epoch is one decode of each image,
    so it has as many times the steps"""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    resident: bool = False
    """the images are held decoded and cut there; see `ResidentLoader`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.crops_per_image:
            raise UserError(
                f"a batch of {self.batch_size} crops is not made of images with "
                f"{self.crops_per_image} crops each"
            )

    @property
    def images_per_batch(self) -> int:
        """Images that are decoded for a batch."""
        return self.batch_size // self.crops_per_image


@dataclass(frozen=True)
class Views:
    """Which parts of which images a batch shows; attributes as in `CropBatch`."""

    rows: Tensor
    windows: Tensor
    flips: Tensor

    def take(self, index: Tensor | slice) -> Views:
        """The views at positions `index`, int64 or bool on the CPU."""
        return Views(self.rows[index], self.windows[index], self.flips[index])


@dataclass(frozen=True)
class CropBatch:
    """Crops and where they come from.

    Attributes:
        images: `[B, S, S, 3]` uint8 on the training device. On a GPU they are read in the stream
            that was current when the batch was taken; another one needs a copy.
        rows: `[B]` int64 on the CPU, the image's row in the `SampleTable`; several crops of one
            image follow one another.
        windows: `[B, 4]` float32 on the CPU: top, left, height, width of the crop in fractions of
            the upright image.
        flips: `[B]` bool on the CPU.
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
    """The rows, of so many, that a rank reads; ranks differ by one row at most."""
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


class CropLoader:
    """Streams the kept samples of a table's shards, epoch by epoch.

    Each rank reads a share of the samples, always the same: consecutive rows, so it opens no tars
    but those that hold them. With `drop_last` every rank yields the same number of full batches an
    epoch and what is left over is skipped (`remainder` of them; others each epoch, unless they are
    read unshuffled); without it every sample of the rank's share is decoded exactly once, the last
    batch being smaller.

    Args:
        table: which samples; its index is written to a temporary folder.
        config: how to read and cut.
        drop_last: see above; training wants it, evaluation must not.
        rank, world_size: this process among those that share the epoch.
        device: where crops end up; "cuda" decodes there.
        seed: of shuffle, crops and flips; the same on all ranks, who draw from it differently.
        first_epoch: epochs that are counted as done; each has another shuffle and other crops.
        state: of an earlier loader (`state()`); goes on with the very next batch.

    Attributes:
        rows: of the table, those that this rank reads.
        steps_per_epoch: batches that it yields an epoch.
        remainder: samples of all ranks that an epoch skips.
        epoch, step: epochs that are done, and batches of the present one.

    Raises:
        ValueError: fewer samples than one batch on every rank, or a state of another set-up.
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
        state: dict[str, object] | None = None,
    ) -> None:
        self.config, self.drop_last = config, drop_last
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self._table = table
        images, least = config.images_per_batch, len(table) // world_size
        if least < (images if drop_last else 1):
            raise UserError(
                f"{len(table)} samples over {world_size} ranks make no batch of "
                f"{images}; lower the batch size"
            )
        self.rows = own_share(len(table), rank, world_size)
        self._runs = -(-len(self.rows) // images)
        self.steps_per_epoch = least // images if drop_last else self._runs
        self.remainder = len(table) - self.steps_per_epoch * images * world_size if drop_last else 0
        self.epoch, self.step = first_epoch, 0
        self._checkpoint: bytes | None = None
        self._state_setup = self._setup(table, seed)
        if state is not None:
            if state["setup"] != self._state_setup:
                raise UserError(
                    "the loader's state belongs to other shards, another batch size, view, seed "
                    f"or world size: {state['setup']} then, {self._state_setup} now"
                )
            self.epoch, self.step = int(state["epoch"]), int(state["step"])  # type: ignore
            first_epoch = int(state["first_epoch"])  # type: ignore
            self._checkpoint = state["dali"]  # type: ignore
        self._first_epoch = first_epoch
        # Ranks, and runs that begin at another epoch, must not draw the same crops.
        self._seed = int(np.random.SeedSequence([seed, first_epoch, rank]).generate_state(1)[0])
        self._remote = any(storage.is_remote(table.paths[n]) for n in table.shards_of(self.rows))
        # A remote one is built when it is first read from: to restore a checkpoint is to read.
        self._pipeline = None if self._remote else self._build()

    def __iter__(self) -> Iterator[CropBatch]:
        """The rest of the current epoch."""
        while self.step < self.steps_per_epoch:
            batch = self._run()
            self.step += 1
            images = self.config.images_per_batch
            valid = len(self.rows) - (self.step - 1) * images
            # DALI fills the last batch up by repeating a sample.
            yield batch if valid >= images else batch.first(valid * self.config.crops_per_image)
        for _ in range(self._runs - self.steps_per_epoch):
            self._run_graph()
        self.epoch, self.step = self.epoch + 1, 0

    def _build(self) -> Pipeline:
        """A pipeline that goes on from the last checkpoint."""
        config, table = self.config, self._table
        with tempfile.TemporaryDirectory(prefix="famt-index-") as folder:
            shards = table.write_indices(Path(folder), self.rows)
            paths = [table.paths[shard] for shard in shards]
            allow_open_files(sum(not storage.is_remote(path) for path in paths))
            pipeline: Pipeline = _crop_graph(
                paths=paths,
                index_paths=[f"{folder}/{shard}.idx" for shard in shards],
                config=config,
                on_gpu=self.device.type == "cuda",
                batch_size=config.images_per_batch,
                num_threads=config.threads or own_cores(),
                device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
                seed=self._seed,
                enable_checkpointing=True,
                checkpoint=self._checkpoint,
                prefetch_queue_depth=_PREFETCHED,
            )
            pipeline.build()  # reads the index
        return pipeline

    def state(self) -> dict[str, object]:
        """All that a loader needs to go on with the batch after the last one yielded."""
        return {
            "setup": self._state_setup,
            "first_epoch": self._first_epoch,
            "epoch": self.epoch,
            "step": self.step,
            "dali": self._pipeline.checkpoint() if self._pipeline else self._checkpoint,
        }

    def _run(self) -> CropBatch:
        source, anchor, shape, extent, flip, *pixels = self._run_graph()
        crops = self.config.crops_per_image
        # All but the rows: a line an image, a column a crop.
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
        """The outputs of the graph's next run.

        A failed read ends a DALI pipeline. On remote shards a new one then continues from the
        checkpoint taken after the last run, so no sample is lost or repeated.

        Raises:
            CacheError: an image can't be decoded.
            OSError: the store failed at every attempt.
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
                # What fails while a checkpoint is restored does not name the operator.
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
        """The stream that a GPU's batches are read in.

        DALI orders the reuse of a batch's memory behind that stream's work, so pixels survive until
        what was queued there has read them. Given none, it reuses memory as soon as Python drops
        the batch.
        """
        on_gpu = self.device.type == "cuda"
        return torch.cuda.current_stream(self.device) if on_gpu else None

    def _read_now(self) -> str:
        """Path of the tar that is being read now, or the first of those that may be."""
        first = self.rows.start + min(self.step * self.config.images_per_batch, len(self.rows) - 1)
        end = first + self.config.shuffle_buffer + (1 + _PREFETCHED) * self.config.images_per_batch
        # Past its end, the reader is in the next epoch.
        rows = range(first, end) if end <= self.rows.stop else self.rows
        shard, shards = (
            self._table.shards_of(range(first, first + 1))[0],
            self._table.shards_of(rows),
        )
        others = f", or another of {len(shards)} tars" if shards[1:] else ""
        return f"{self._table.paths[shard]}{others}"

    def _explain(self, error: RuntimeError) -> None:
        """Raise a CacheError if DALI failed at an image, of which the error names the row."""
        # Of a failed decode DALI says `<tar>:<offset>:<row>`, of headers nothing.
        decoding = re.search(r"Failed to decode sample #\d+ : .*:(\d+)$", str(error), re.M)
        if decoding is None and "nvImageCodec failure" not in str(error):
            return
        sample = self._table.key(int(decoding[1])) if decoding else "an image of these shards"
        raise CacheError(
            f"{sample}: DALI can't decode it, though it was kept when its shard was scored: "
            "the tar was written over, or the decoders here are others. Remove it from the "
            f"tar, or have all judged again: {self._table.judge_again()}"
        ) from error

    def _setup(self, table: SampleTable, seed: int) -> str:
        """Everything that decides which sample comes next, spelled out."""
        config = self.config
        return (
            f"{table.digest} batch={config.batch_size} size={config.image_size} "
            f"view={config.view} interpolation={config.interpolation} "
            f"shuffle={config.shuffle_buffer} drop_last={self.drop_last} seed={seed} "
            f"rank={self.rank}/{self.world_size} crops={config.crops_per_image}"
            + (" resident" if config.resident else "")
        )


def _reason(error: RuntimeError) -> str:
    """What DALI says of a failed read, without what it says of the pipeline."""
    text = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    return text.strip(": \n").partition("\n")[0] or "no reason given"


def rows_of(source: TensorListCPU) -> Tensor:
    """The rows `[B]` int64 that an index carries in each sample's `source_info`."""
    infos = (bytes(np.asarray(source[n])) for n in range(len(source)))
    return torch.tensor([int(info.rpartition(b":")[2]) for info in infos])


@pipeline_def(exec_dynamic=True)
def _crop_graph(
    paths: list[str],
    index_paths: list[str],
    config: LoaderConfig,
    on_gpu: bool,
) -> tuple[DataNode, ...]:
    """Crops' pixels if they are decoded each time, and which parts of which images they are."""
    encoded = fn.readers.webdataset(
        paths=paths,
        index_paths=index_paths,
        ext=["jpg"],
        missing_component_behavior="error",
        pad_last_batch=True,
        random_shuffle=config.shuffle_buffer > 0,
        initial_fill=max(1, config.shuffle_buffer),
        dont_use_mmap=True,
        name="reader",
    )
    extent = fn.peek_image_shape(encoded)[:2]
    cuts = [_cut(extent, config.view) for _ in range(config.crops_per_image)]
    pixels = () if config.resident else (_pixels(encoded, cuts, config, on_gpu),)
    source = fn.get_property(encoded, key="source_info")
    anchor, shape, flip = (fn.stack(*each) for each in zip(*cuts, strict=True))
    return source, anchor, shape, extent, flip, *pixels


def _pixels(encoded: DataNode, cuts: list[_Cut], config: LoaderConfig, on_gpu: bool) -> DataNode:
    """Decode, cut and resize: of each image `[crops, S, S, 3]` uint8."""
    decoder: dict[str, Any] = {"output_type": types.RGB, "device": "cpu"}
    if on_gpu and config.decode.on == "gpu":
        decoder |= {
            "device": "mixed",
            "jpeg_fancy_upsampling": True,  # as libjpeg-turbo does, which scored the maps
            "hw_decoder_load": config.decode.hardware_share,
            "preallocate_width_hint": config.decode.preallocate,
            "preallocate_height_hint": config.decode.preallocate,
        }
    resize = partial(
        fn.resize,
        size=[config.image_size, config.image_size],
        interp_type=_INTERPOLATIONS[config.interpolation],
        antialias=True,
    )
    if decoder["device"] == "cpu" and len(cuts) == 1:
        region = fn.decoders.image_slice(
            encoded, cuts[0].anchor, cuts[0].shape, axes=[0, 1], **decoder
        )
        crops = [resize(region.gpu() if on_gpu else region)]
    else:
        # No region is decoded on a GPU: nvImageCodec is reported to crash there (its issue 55).
        whole = fn.decoders.image(encoded, **decoder)
        whole = whole.gpu() if on_gpu else whole
        crops = [
            resize(
                whole,
                roi_start=fn.cast(cut.anchor, dtype=types.FLOAT),
                roi_end=fn.cast(cut.anchor + cut.shape, dtype=types.FLOAT),
            )
            for cut in cuts
        ]
    return fn.stack(
        *(fn.flip(crop, horizontal=cut.flip) for crop, cut in zip(crops, cuts, strict=True))
    )


class _Cut(NamedTuple):
    """Of each image a view: top and left, height and width, px, and whether it is flipped."""

    anchor: DataNode
    shape: DataNode
    flip: DataNode


def _cut(extent: DataNode, view: View) -> _Cut:
    flip = fn.random.coin_flip(probability=view.flip if isinstance(view, RandomView) else 0.0)
    if isinstance(view, RandomView):
        anchor, shape = fn.random_crop_generator(
            extent,
            random_area=list(view.area),
            random_aspect_ratio=list(view.aspect_ratio),
        )
        return _Cut(anchor, shape, flip)
    shape = extent
    if isinstance(view, CentreView):
        side = fn.reductions.min(extent, axes=[0], keep_dims=True)
        side = fn.cast(side * view.fraction, dtype=types.INT64)
        shape = fn.cat(side, side, axis=0)
    return _Cut(fn.cast((extent - shape) // 2, dtype=types.INT64), shape, flip)
