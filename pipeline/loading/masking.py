"""From crops and the scores of their images to masked, thrown and visible patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from famt.device_copies import send
from famt.geometry import crop_maps
from famt.mask_units import split_of_patches, unit_weights
from famt.models import PatchConfig
from famt.patches import gather_patches
from famt.pipeline.loading.loader import CropBatch, Views
from famt.pipeline.options import JoinConfig
from famt.sampling import PatchSplit, loss_weights, predict_some, sample_patches
from famt.targets import low_pass


@dataclass(frozen=True)
class PatchBatch:
    """The patches of a batch that training needs: pixels of two groups, positions of all three.

    Attributes:
        visible: `[B, V, P*P*3]` uint8 pixels of the patches that the encoder sees.
        masked: `[B, K, P*P*3]` pixels of the patches to reconstruct, `split.predicted`; uint8, or
            float32 on the same scale if they are low-passed.
        split: positions of all groups, on the device of the pixels.
        views: which parts of which images the crops show.
        loss_weights: `[B, K]` float32, factor of each of those patches in the loss; None for 1.
    """

    visible: Tensor
    masked: Tensor
    split: PatchSplit
    views: Views
    loss_weights: Tensor | None = None

    def chunk(self, parts: int) -> list[PatchBatch]:
        """The batch in so many equal parts, in order."""
        splits, views = (
            zip(*(each.chunk(parts) for each in vars(whole).values()), strict=True)
            for whole in (self.split, self.views)
        )
        visible, masked = self.visible.chunk(parts), self.masked.chunk(parts)
        weights = [None] * parts if self.loss_weights is None else self.loss_weights.chunk(parts)
        return [
            PatchBatch(seen, hidden, PatchSplit(*split), Views(*view), weight)
            for seen, hidden, split, view, weight in zip(
                visible, masked, splits, views, weights, strict=True
            )
        ]


def crop_scores(maps: Tensor, crops: CropBatch, grid: int) -> Tensor:
    """Scores of crops' patches, read from maps of their whole images.

    Args:
        maps: `[R, G, G]` float on the CPU, a row an image.
        grid: patches a side of a crop.

    Returns:
        `[B, grid**2]` float32 on the crops' device.
    """
    device = crops.images.device
    windows, flips = send(crops.windows, device), send(crops.flips, device)
    return crop_maps(send(maps[crops.rows], device), windows, flips, grid).flatten(1)


def split_crops(
    crops: CropBatch,
    weights: Tensor,
    sizes: PatchConfig,
    config: JoinConfig,
    generator: torch.Generator | None = None,
    progress: float = 1.0,
) -> PatchBatch:
    """Sample masked, thrown and visible patches by weight, and gather the pixels needed.

    Args:
        weights: `[B, N]` of their patches; see `famt.sampling.patch_weights`.
        sizes: of crops, patches and units.
        generator: of the draws, on the crops' device.
        progress: share of the run's steps done, in [0, 1].
    """
    split = sample_patches(
        unit_weights(weights, sizes.unit),
        config.mask_ratio,
        config.throw_ratio,
        generator,
        visible=config.visible,
        thrown=config.thrown,
        blend=config.blend_at(progress),
    )
    split = split_of_patches(split, sizes.unit)
    split = predict_some(split, config.predicted_share, config.predicted, generator)
    images = crops.images
    targets = images if sizes.low_pass is None else low_pass(images, sizes.low_pass)
    return PatchBatch(
        visible=gather_patches(images, split.visible, sizes.patch_size),
        masked=gather_patches(targets, split.predicted, sizes.patch_size),
        split=split,
        views=crops.views,
        loss_weights=loss_weights(weights, split, config.loss_exponent)
        if config.loss_exponent
        else None,
    )
