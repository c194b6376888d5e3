"""A loader for small data sets: decodes each image once and cuts crops from memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.dlpack import from_dlpack

from famt.device_copies import send
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dali_graphs import build_pipeline, rows_of, whole_image_graph
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.loading.limits import free_memory
from famt.pipeline.loading.loader import CropLoader, Views
from famt.pipeline.options import LoaderConfig
from famt.pipeline.progress import progress_bar
from famt.resample import resample

_BATCH = 256  # images that are decoded at a time
_ROOM = 0.5  # share of the free memory that the images may take


def crop_loader(table: SampleTable, config: LoaderConfig, **options: Any) -> CropLoader:
    """The loader that `config.resident` asks for; arguments and errors are those of its class."""
    return (ResidentLoader if config.resident else CropLoader)(table, config, **options)


class ResidentLoader(CropLoader):
    """A `CropLoader` that decodes each image of its rank's share once, into the device's memory.

    Rows, windows, flips, their order and the state are those of `CropLoader`: DALI still reads
    headers and draws crops. Pixels differ by rounding, and at a crop's rim where `CropLoader`'s
    filter sees beyond the crop. Images take 3 bytes a pixel, padded to the largest: 0.5 GB for
    40,000 of 64 x 64 px.

    Arguments and errors are those of `CropLoader`, and a UserError if the images take more than
    half of the free memory.
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
        pipeline = build_pipeline(
            whole_image_graph, self._table, self.rows, self.config, self.device, batch_size=_BATCH
        )
        with progress_bar(total=len(self.rows), desc="decoding once", unit="img") as bar:
            while bar.n < len(self.rows):
                try:
                    source, extent, decoded = pipeline.run(self._stream())
                except RuntimeError as error:
                    self._explain(error)
                    raise
                place = rows_of(source) - self.rows.start
                part = from_dlpack(decoded.as_tensor()).permute(0, 3, 1, 2)
                height, width = (max(part.shape[n], images.shape[n]) for n in (2, 3))
                if (height, width) != images.shape[2:]:
                    images = self._grown(images, height, width)
                images[send(place, self.device), :, : part.shape[2], : part.shape[3]] = part
                extents[place] = torch.from_numpy(extent.as_array()).long()
                bar.update(min(_BATCH, len(self.rows) - bar.n))
        return images, extents.to(self.device)

    def _grown(self, images: Tensor, height: int, width: int) -> Tensor:
        """The images padded to that size, or a UserError if memory has no room for them."""
        needed = len(images) * height * width * 3
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of smaller images
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = free_memory()
        free += images.numel()  # bytes that these images hold now
        if needed > _ROOM * free:
            raise UserError(
                f"--resident: {len(images)} images of up to {width} x {height} px take "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {self.device}; leave "
                "it out to decode images each time"
            )
        return pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
