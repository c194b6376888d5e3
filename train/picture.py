"""A picture of crops as a run sees them: signals, weights, split and reconstruction."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from famt.masked import MaskedModel
from famt.patches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalise,
    normalise_images,
    patchify,
    unpatchify,
)
from famt.pipeline.loading.masking import PatchBatch
from famt.pipeline.scoring.model_scores import model_scores
from famt.sampling import PatchSplit, blended_weights
from famt.train.signals.patch_weights import Weighed


@torch.no_grad()
def picture_of_crops(model: MaskedModel, weighed: Weighed, seed: int = 0) -> Image.Image:
    """A picture of crops, one row each, whose patches are drawn by `seed`.

    Weights are left out if no signal weighs. If other signals than attention do, the attention of
    an encoder that has a class token is shown beside them.
    """
    grid, patch_size = model.config.grid, model.config.patch_size
    crops, blend = weighed.crops, weighed.join.blend_at(weighed.progress)
    weights = blended_weights(weighed.weights, blend)
    shown = {name: found for name, (found, _) in weighed.scores.items()}
    if shown and "attention" not in shown and model.encoder.has_class_token:
        pixels = normalise_images(crops.images)
        shown |= model_scores(["attention"], model.encoder, pixels)
    generator = torch.Generator(crops.images.device).manual_seed(seed)
    batch = weighed.split(model.config, generator)
    patches = patchify(crops.images, patch_size)
    columns = {
        "crop": crops.images,
        **{name: found.view(-1, grid, grid) for name, found in shown.items()},
        **({"weights": weights.view(-1, grid, grid)} if shown else {}),
        "split": unpatchify(_show_split(patches, batch.split), patch_size),
        "reconstruction": unpatchify(_reconstruct(model, patches, batch), patch_size),
    }
    return draw({title: panels.cpu().numpy() for title, panels in columns.items()})


def draw(columns: dict[str, NDArray]) -> Image.Image:
    """Draw titled columns, each of images `[B, H, W, 3]` uint8 or maps `[B, G, G]`."""
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(2 * len(columns), 2 * rows + 0.4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, panels) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=min(17, 240 / len(title)))
        for row in range(rows):
            axes[row][column].imshow(panels[row], cmap="magma", interpolation="nearest")
            axes[row][column].set_axis_off()
    figure.tight_layout(pad=0.3)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _show_split(patches: Tensor, split: PatchSplit) -> Tensor:
    shown = patches.clone()
    side = round((patches.shape[-1] / 3) ** 0.5)
    line = torch.eye(side, dtype=torch.bool, device=patches.device)
    cross = line | line.flip(0)
    struck = torch.where(cross[..., None], 230, 160).expand(side, side, 3).flatten().to(torch.uint8)
    dark = (patches.float() * 0.2).to(torch.uint8)
    index = torch.arange(len(patches), device=patches.device)[:, None]
    shown[index, split.masked] = dark[index, split.masked]
    shown[index, split.thrown] = struck
    return shown


def _reconstruct(model: MaskedModel, patches: Tensor, batch: PatchBatch) -> Tensor:
    """Crops with visible patches, predicted patches as predicted, and all others grey."""
    split = batch.split
    predicted = model.reconstruct(normalise(batch.visible), normalise(batch.masked), split)
    deviation, mean = (torch.tensor(v).to(predicted) for v in (IMAGENET_STD, IMAGENET_MEAN))
    pixels = predicted.unflatten(-1, (-1, 3)) * deviation + mean
    shown = torch.full_like(patches, 160)
    index = torch.arange(len(patches), device=patches.device)[:, None]
    shown[index, split.visible] = batch.visible
    shown[index, split.predicted] = (pixels.flatten(-2).clamp(0, 1) * 255).to(torch.uint8)
    return shown
