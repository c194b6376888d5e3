"""The DALI graphs: tar shards in; crops, or whole images, and their rows out.

Each graph serves CPU and GPU; on a GPU, JPEGs for large crops are decoded there (`mixed`). A CPU
that cuts one crop from an image decodes that region alone. Everything else decodes images whole and
cuts while it resizes, once a crop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU
from torch import Tensor

from famt.pipeline import storage
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.limits import allow_open_files, own_cores
from famt.pipeline.options import CentreView, LoaderConfig, RandomView, View

_SUITS_A_GPU = 128  # side of crops, px
_INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


def build_pipeline(
    graph: Callable[..., Pipeline],
    table: SampleTable,
    rows: range,
    config: LoaderConfig,
    device: torch.device,
    **options: Any,
) -> Pipeline:
    """A pipeline over consecutive rows of a table, with its index read.

    Args:
        graph: `crop_graph` or `whole_image_graph`; takes further `options` of `pipeline_def`.
    """
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="famt-index-") as folder:
        shards = table.write_indices(Path(folder), rows)
        paths = [table.paths[shard] for shard in shards]
        allow_open_files(sum(not storage.is_remote(path) for path in paths))
        pipeline = graph(
            paths=paths,
            index_paths=[f"{folder}/{shard}.idx" for shard in shards],
            config=config,
            on_gpu=on_gpu,
            num_threads=config.threads or own_cores(),
            device_id=(device.index or 0) if on_gpu else None,
            **options,
        )
        pipeline.build()  # reads the index
    return pipeline


def rows_of(source: TensorListCPU) -> Tensor:
    """The rows `[B]` int64 that the index puts into each sample's `source_info`."""
    infos = (bytes(np.asarray(source[n])) for n in range(len(source)))
    return torch.tensor([int(info.rpartition(b":")[2]) for info in infos])


@pipeline_def(exec_dynamic=True)
def crop_graph(
    paths: list[str], index_paths: list[str], config: LoaderConfig, on_gpu: bool
) -> tuple[DataNode, ...]:
    """Source, anchor, shape, extent and flip of crops, and their pixels unless images are held."""
    encoded = _read(
        paths,
        index_paths,
        random_shuffle=config.shuffle_buffer > 0,
        initial_fill=max(1, config.shuffle_buffer),
        name="reader",
    )
    extent = fn.peek_image_shape(encoded)[:2]
    cuts = [_cut(extent, config.view) for _ in range(config.crops_per_image)]
    pixels = () if config.resident else (_pixels(encoded, cuts, config, on_gpu),)
    source = fn.get_property(encoded, key="source_info")
    anchor, shape, flip = (fn.stack(*each) for each in zip(*cuts, strict=True))
    return source, anchor, shape, extent, flip, *pixels


@pipeline_def(exec_dynamic=True)
def whole_image_graph(
    paths: list[str], index_paths: list[str], config: LoaderConfig, on_gpu: bool
) -> tuple[DataNode, ...]:
    """Source and extent of images, and their pixels, padded to the largest of the batch."""
    encoded = _read(paths, index_paths)
    images = fn.decoders.image(encoded, **decoder(config, on_gpu))
    source = fn.get_property(encoded, key="source_info")
    return source, fn.peek_image_shape(encoded)[:2], fn.pad(images.gpu() if on_gpu else images)


def _read(paths: list[str], index_paths: list[str], **options: Any) -> DataNode:
    return fn.readers.webdataset(
        paths=paths,
        index_paths=index_paths,
        ext=["jpg"],
        missing_component_behavior="error",
        pad_last_batch=True,
        dont_use_mmap=True,
        **options,
    )


def decoder(config: LoaderConfig, on_gpu: bool) -> dict[str, Any]:
    """Arguments of DALI's image decoders."""
    decode = config.decode
    automatic = "gpu" if config.image_size >= _SUITS_A_GPU else "cpu"
    if not on_gpu or (automatic if decode.on == "auto" else decode.on) == "cpu":
        return {"output_type": types.RGB, "device": "cpu"}
    return {
        "output_type": types.RGB,
        "device": "mixed",
        "jpeg_fancy_upsampling": True,  # as libjpeg-turbo, on whose pixels the maps were scored
        "hw_decoder_load": decode.hardware_share,
        "preallocate_width_hint": decode.preallocate,
        "preallocate_height_hint": decode.preallocate,
    }


def _pixels(encoded: DataNode, cuts: list[_Cut], config: LoaderConfig, on_gpu: bool) -> DataNode:
    """Decode, cut and resize: of each image `[crops, S, S, 3]` uint8."""
    decoding = decoder(config, on_gpu)
    resize = partial(
        fn.resize,
        size=[config.image_size, config.image_size],
        interp_type=_INTERPOLATIONS[config.interpolation],
        antialias=True,
    )
    if decoding["device"] == "cpu" and len(cuts) == 1:
        region = fn.decoders.image_slice(
            encoded, cuts[0].anchor, cuts[0].shape, axes=[0, 1], **decoding
        )
        crops = [resize(region.gpu() if on_gpu else region)]
    else:
        # No region is decoded on a GPU: nvImageCodec is reported to crash there (its issue 55).
        whole = fn.decoders.image(encoded, **decoding)
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
