"""A loader for small sets: images are decoded once and held, and crops are cut from memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.dlpack import from_dlpack
from tqdm import tqdm

from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.limits import allow_open_files
from famt.pipeline.loader import CropLoader, Views, own_cores, rows_of
from famt.resample import resample
from famt.transfer import send

_BATCH = 256  # images that are decoded at a time
_ROOM = 0.5  # share of the free memory that the images may take


class ResidentLoader(CropLoader):
    """A `CropLoader` that decodes each image of its rank's share once, into the device's memory.

    It yields the same rows, windows and flips in the same order, and its state is that loader's:
    DALI still reads headers and draws crops. Pixels differ by rounding, and at a crop's rim, where
    the other loader's filter on a GPU sees what lies beyond. Images are held whole, 3 bytes a
    pixel, padded to the largest: 0.5 GB for 40,000 of 64 x 64 px.

    Args: those of `CropLoader`.

    Raises:
        UserError: also if the images take more than half of the memory that is free.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._images, self._extents = self._decode()

    def _pixels(self, views: Views, *decoded: object) -> Tensor:
        place = send(views.rows - self.rows.start, self.device)
        return resample(
            self._images[place],
            self._extents[place],
            send(views.windows, self.device),
            send(views.flips, self.device),
            self.config.image_size,
            self.config.interpolation,
        )

    def _decode(self) -> tuple[Tensor, Tensor]:
        """Images `[n, 3, H, W]` uint8 and their extents `[n, 2]` px, in the order of `rows`."""
        extents = torch.zeros(len(self.rows), 2, dtype=torch.int64)
        images = torch.zeros(len(self.rows), 3, 0, 0, dtype=torch.uint8, device=self.device)
        with tempfile.TemporaryDirectory(prefix="famt-index-") as folder:
            shards = self._table.write_indices(Path(folder), self.rows)
            paths = [self._table.paths[shard] for shard in shards]
            allow_open_files(sum(not storage.is_remote(path) for path in paths))
            graph = _whole_images(
                paths=paths,
                index_paths=[f"{folder}/{shard}.idx" for shard in shards],
                on_gpu=self.device.type == "cuda",
                batch_size=_BATCH,
                num_threads=self.config.threads or own_cores(),
                device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
            )
            with tqdm(total=len(self.rows), desc="decoding once", unit="img") as bar:
                while bar.n < len(self.rows):
                    try:
                        source, extent, decoded = graph.run(self._stream())
                    except RuntimeError as error:
                        self._explain(error)
                        raise
                    place = rows_of(source) - self.rows.start
                    part = from_dlpack(decoded.as_tensor()).permute(0, 3, 1, 2)
                    height, width = (part.shape[n] - images.shape[n] for n in (2, 3))
                    if height > 0 or width > 0:
                        images = self._grown(images, max(height, 0), max(width, 0))
                    images[send(place, self.device), :, : part.shape[2], : part.shape[3]] = part
                    extents[place] = torch.from_numpy(extent.as_array()).long()
                    bar.update(min(_BATCH, len(self.rows) - bar.n))
        return images, extents.to(self.device)

    def _grown(self, images: Tensor, height: int, width: int) -> Tensor:
        """The array with room for images that are so much larger.

        Raises:
            UserError: there is no memory for it.
        """
        count, _, high, wide = images.shape
        needed = count * (high + height) * (wide + width) * 3
        free = (
            torch.cuda.mem_get_info(self.device)[0]
            if self.device.type == "cuda"
            else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        if needed > _ROOM * free:
            raise UserError(
                f"--resident: {count} images of up to {wide + width} x {high + height} px take "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {self.device}; leave "
                "it out, and images are decoded each time"
            )
        return pad(images, (0, width, 0, height))


@pipeline_def(exec_dynamic=True)
def _whole_images(paths: list[str], index_paths: list[str], on_gpu: bool) -> tuple[DataNode, ...]:
    encoded = fn.readers.webdataset(
        paths=paths,
        index_paths=index_paths,
        ext=["jpg"],
        missing_component_behavior="error",
        pad_last_batch=True,
        dont_use_mmap=True,
    )
    decoder: dict[str, Any] = {"output_type": types.RGB, "device": "cpu"}
    if on_gpu:
        decoder |= {"device": "mixed", "jpeg_fancy_upsampling": True}
    images = fn.decoders.image(encoded, **decoder)
    source = fn.get_property(encoded, key="source_info")
    return source, fn.peek_image_shape(encoded)[:2], fn.pad(images)
