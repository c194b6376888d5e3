"""Pictures of what a run does to images.

    python -m train.figures --checkpoint runs/first --cache scores/ --shards 'shards/val-*.tar' \\
        --out picture.png

A row an image: the crop, the signals, the weights as the run makes them, the split (masked patches
dark, thrown ones struck out) and the reconstruction. What the run keeps of its own images in banks
and generations is asked anew of the checkpoint's encoder, for these crops; hardness, which only
training tells, is left out. The run's own pictures in TensorBoard have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from annotated_types import Ge
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
from famt.sampling import PatchSplit
from pipeline.cache import ScoreCache
from pipeline.join import JoinConfig, PatchBatch, crop_scores, split_crops
from pipeline.loader import CropBatch, CropLoader, LoaderConfig, RandomView
from pipeline.model_scores import model_scores
from pipeline.options import Checked, Seed
from pipeline.scores import ScoreSpec
from pipeline.table import load_maps, load_samples
from train.checkpoint import load, load_model
from train.program import called, run_program
from train.signals.config import FrequencyConfig
from train.signals.weights import OFF, Scores, weigh


@dataclass(frozen=True)
class Figures(Checked):
    """A picture of a checkpoint at work."""

    checkpoint: Path
    """checkpoint file, or folder of a run"""
    cache: str
    """score cache that knows the shards"""
    shards: list[str]
    """where the images come from"""
    out: Path
    """PNG file to write"""
    images: Annotated[int, Ge(1)] = 6
    """rows of the picture"""
    view: RandomView = field(default_factory=lambda: RandomView(area=(0.6, 1.0)))
    seed: Seed = 0
    """of the choice of images, their crops and their splits"""


@torch.inference_mode()
def main(config: Figures) -> Path:
    """Draw the picture; returns where it is."""
    model = load_model(config.checkpoint)
    run = load(config.checkpoint)
    cache = ScoreCache(config.cache)
    samples = load_samples(config.shards, cache)
    loader = CropLoader(
        samples,
        LoaderConfig(
            batch_size=min(config.images, len(samples)),
            image_size=model.config.image_size,
            view=config.view,
            threads=1,
        ),
        drop_last=True,
        seed=config.seed,
    )
    crops = next(iter(loader))
    scores: Scores = {}
    for name in ("frequency", "attention"):
        slot = run.config[name]
        refreshed = run.signals.get(name, {}).get("generation") is not None
        if name == "frequency" and FrequencyConfig(**slot).is_cached and not refreshed:
            maps = load_maps(samples, cache, ScoreSpec(**run.config["spec"]))
            found = crop_scores(maps, crops, model.config.grid)
            scores[name] = (found, slot["cached_exponent"])
        elif slot["source"] != OFF:
            kind = slot["kind"]
            found = model_scores([kind], model.encoder, normalise_images(crops.images))[kind]
            scores[name] = (found, slot["exponent"])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    join = JoinConfig(**run.config["join"])
    picture(model, crops, scores, join, config.seed).save(config.out)
    print(config.out)
    return config.out


@torch.no_grad()
def picture(
    model: MaskedModel,
    crops: CropBatch,
    scores: Scores,
    join: JoinConfig,
    seed: int = 0,
) -> Image.Image:
    """Draw crops as a run sees them, a row each.

    Args:
        scores: of each signal that weighs the patches; without one for attention the picture shows
            what the model attends to in these crops.
    """
    grid, patch_size = model.config.grid, model.config.patch_size
    weights = weigh(scores, crops, grid)
    shown = {name: found for name, (found, _) in scores.items()}
    if "attention" not in shown:
        pixels = normalise_images(crops.images)
        shown |= model_scores(["attention"], model.encoder, pixels)
    generator = torch.Generator(crops.images.device).manual_seed(seed)
    batch = split_crops(crops, weights, model.config, join, generator)
    patches = patchify(crops.images, patch_size)
    columns = {
        "crop": crops.images,
        **{name: found.view(-1, grid, grid) for name, found in shown.items()},
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
    run_program(main, tyro.cli(Figures, prog=called(), description=__doc__))
