"""Segmentation masks: the class of every pixel."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from famt.geometry import crop_labels
from famt.pipeline import storage
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.sharding.shards import list_shard

IGNORED = 255  # a pixel of no class, as in Pascal VOC, Cityscapes and ADE20K
_MODES = ("1", "L", "P", "I", "I;16")


def read_masks(table: SampleTable) -> list[bytes]:
    """The PNG of every sample's mask, in the order of rows; a UserError names one without.

    Each tar is read once, whole.
    """

    def of_shard(number: int) -> list[bytes]:
        data = storage.read(table.paths[number])
        places = {sample.key: sample.mask for sample in list_shard(data).samples}
        masks = []
        for key in table.keys(number):
            place = places.get(key)
            if place is None:
                raise UserError(
                    f"{table.urls[number]}:{key} has no mask; segmentation needs a <key>.mask.png "
                    "beside every image"
                )
            masks.append(data[place[0] : sum(place)])
        return masks

    with ThreadPoolExecutor(4) as pool:
        return [mask for part in pool.map(of_shard, range(len(table.urls))) for mask in part]


def decode_mask(png: bytes) -> Tensor:
    """Class of every pixel, `[H, W]` int64, `IGNORED` for none; of a palette image its indices.

    Raises:
        UserError: no image, or one with colours.
    """
    try:
        with Image.open(io.BytesIO(png)) as image:
            if image.mode not in _MODES:
                raise UserError(f"a mask of {image.mode} colours; it must hold class numbers")
            return torch.from_numpy(np.array(image).astype(np.int64))
    except OSError as error:
        raise UserError(f"a mask that can't be decoded: {error}") from error


def crop_masks(masks: Iterable[bytes], windows: Tensor, flips: Tensor, size: int) -> Tensor:
    """Masks of crops, cut by the crops' views: `[B, size, size]` int64.

    Args:
        masks: PNG of each crop's image.
        windows, flips: as of `famt.pipeline.loading.loader.CropBatch`.
    """
    views = zip(masks, windows, flips.tolist(), strict=True)
    return torch.stack(
        [crop_labels(decode_mask(png), window, flip, size) for png, window, flip in views]
    )
