"""Pictures of what a run does to images.

    python -m train.figures --checkpoint runs/first --cache scores/ --shards 'shards/val-*.tar' \\
        --out picture.png

A row an image: the crop, its frequency map, the encoder's attention, the weights as the run makes
them, the split (masked patches dark, thrown ones struck out) and the reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
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
    patchify,
    unpatchify,
)
from famt.sampling import PatchSplit
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, PatchBatch, crop_scores, join_weights, split_crops
from pipeline.loader import CropBatch, CropLoader, LoaderConfig, RandomView
from pipeline.scores import ScoreSpec
from pipeline.table import load_maps, load_samples
from train.attention import LiveAttention
from train.checkpoint import load, load_model
from train.program import run_program


@dataclass(frozen=True)
class Figures:
    """A picture of a checkpoint at work."""

    checkpoint: Path
    """checkpoint file, or folder of a run"""
    cache: str
    """score cache that knows the shards"""
    shards: list[str]
    """where the images come from"""
    out: Path
    """PNG file to write"""
    images: int = 6
    """rows of the picture"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.6, 1.0)))
    seed: int = 0
    """of the choice of images, their crops and their splits"""


@torch.inference_mode()
def main(config: Figures) -> Path:
    """Draw the picture; returns where it is."""
    model = load_model(config.checkpoint)
    run = load(config.checkpoint).config
    cache, spec = ScoreCache(config.cache), ScoreSpec(**run["spec"])
    weighs = bool(run["join"]["frequency_exponent"])
    table = load_samples(config.shards, cache, spec if weighs else None)
    maps = load_maps(table, cache, spec) if weighs else None
    loader = CropLoader(
        table,
        LoaderConfig(
            batch_size=min(config.images, len(table)),
            image_size=model.config.image_size,
            view=config.view,
            threads=1,
        ),
        drop_last=True,
        seed=config.seed,
    )
    crops = next(iter(loader))
    attention = None
    if run["attention"] != "off":
        attention = LiveAttention(model.encoder, run["attention_score"])(crops.images)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    join = JoinConfig(**run["join"])
    picture(model, maps, crops, join, attention, config.seed).save(config.out)
    print(config.out)
    return config.out


@torch.no_grad()
def picture(
    model: MaskedModel,
    maps: Tensor | None,
    crops: CropBatch,
    join: JoinConfig,
    attention: Tensor | None,
    seed: int = 0,
) -> Image.Image:
    """Draw crops as a run sees them, a row each.

    Args:
        attention: `[B, N]` scores that enter the weights, if any do; without them the picture
            shows what the model attends to in these crops.
    """
    grid, patch_size = model.config.grid, model.config.patch_size
    device = crops.images.device
    weights = join_weights(crops, maps, grid, join, attention)
    if attention is None:
        attention = LiveAttention(model.encoder, "famt")(crops.images)
    generator = torch.Generator(device).manual_seed(seed)
    batch = split_crops(crops, weights, model.config, join, generator)
    patches = patchify(crops.images, patch_size)
    columns = {"crop": crops.images}
    if maps is not None:
        frequency = crop_scores(maps, crops, grid)
        columns["frequency"] = frequency.view(-1, grid, grid)
    columns |= {
        "attention": attention.view(-1, grid, grid),
        "weights": weights.view(-1, grid, grid),
        "split": unpatchify(_show_split(patches, batch.split), patch_size),
        "reconstruction": unpatchify(_reconstruct(model, patches, batch), patch_size),
    }
    return draw({title: panels.cpu().numpy() for title, panels in columns.items()})


def draw(columns: dict[str, NDArray]) -> Image.Image:
    """A picture of titled columns, each of images `[B, H, W, 3]` uint8 or maps `[B, G, G]`."""
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(2 * len(columns), 2 * rows + 0.3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, panels) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=11)
        for row in range(rows):
            axes[row][column].imshow(panels[row], cmap="magma", interpolation="nearest")
            axes[row][column].set_axis_off()
    figure.tight_layout(pad=0.3)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _show_split(patches: Tensor, split: PatchSplit) -> Tensor:
    shown = patches.clone()
    side = round((patches.shape[-1] / 3) ** 0.5)
    line = torch.arange(side)
    cross = torch.zeros(side, side, dtype=torch.bool, device=patches.device)
    cross[line, line] = cross[line, side - 1 - line] = True
    struck = torch.where(cross[..., None], 230, 160).expand(side, side, 3).flatten().to(torch.uint8)
    dark = (patches.float() * 0.2).to(torch.uint8)
    for row in range(len(patches)):
        shown[row, split.masked[row]] = dark[row, split.masked[row]]
        shown[row, split.thrown[row]] = struck
    return shown


def _reconstruct(model: MaskedModel, patches: Tensor, batch: PatchBatch) -> Tensor:
    """The crop with masked patches as predicted; those that enter nothing are left grey."""
    split = batch.split
    predicted = model.reconstruct(normalise(batch.visible), normalise(batch.masked), split)
    deviation, mean = (torch.tensor(v).to(predicted) for v in (IMAGENET_STD, IMAGENET_MEAN))
    pixels = predicted.unflatten(-1, (-1, 3)) * deviation + mean
    shown = torch.full_like(patches, 160)
    index = torch.arange(len(patches), device=patches.device)[:, None]
    shown[index, split.visible] = batch.visible
    shown[index, split.predicted] = (pixels.flatten(-2).clamp(0, 1) * 255).to(torch.uint8)
    return shown


if __name__ == "__main__":
    run_program(main, tyro.cli(Figures, description=__doc__))
