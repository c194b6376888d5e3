"""Pictures of what a run does to images.

    famt figures --checkpoint runs/first --cache scores/ --shards 'shards/val-*.tar' \\
        --out picture.png

A row an image: the crop, the signals, the weights that the run draws by at that step, the split
(masked patches dark, thrown ones struck out) and the reconstruction. Generations of maps are asked
anew of the checkpoint's encoder, for these crops. What the run keeps in banks is shown of its own
images; of others attention is asked anew, and nothing is known of hardness, which training tells.
"""

from __future__ import annotations

from pathlib import Path

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
from famt.pipeline.cache import ScoreCache
from famt.pipeline.dataset import load_maps, load_samples
from famt.pipeline.loader import CropLoader
from famt.pipeline.masking import PatchBatch
from famt.pipeline.model_scores import model_scores
from famt.pipeline.options import LoaderConfig
from famt.sampling import PatchSplit, blended_weights
from famt.train.checkpoint import Checkpoint, load, load_model
from famt.train.config import Pretrain
from famt.train.distributed import Ranks
from famt.train.options import Figures
from famt.train.program import parsed, run_program
from famt.train.signals.attention import Live
from famt.train.signals.banked import Banked
from famt.train.signals.cached import Cached
from famt.train.signals.config import AttentionConfig
from famt.train.signals.patch_weights import Weighed, build_signal, weigh_crops
from famt.train.signals.signal import Context, Signal


@torch.inference_mode()
def main(config: Figures) -> Path:
    """Draw the picture; returns where it is."""
    model = load_model(config.checkpoint)
    run = load(config.checkpoint)
    options = Pretrain.from_description(run.config)
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
    alone = Ranks(0, 1, "", torch.device("cpu"))
    context = Context(
        samples=samples,
        sizes=model.config,
        encoder=model.encoder,
        ranks=alone,
        cached=lambda: load_maps(samples, cache, options.spec),
        score=options.spec.id,
        seed=options.seed,
        parts=options.accumulate,
        bf16=options.precision == "bf16",
    )
    weighed = weigh_crops(
        options,
        _signals(run, options, context),
        crops,
        epoch=run.epoch,
        step=run.step,
        progress=run.epoch / options.epochs,
        look=True,
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    picture(model, weighed, config.seed).save(config.out)
    print(config.out)
    return config.out


def _signals(run: Checkpoint, options: Pretrain, context: Context) -> list[Signal]:
    """The signals of a run at a checkpoint, for images that may be others than its own."""
    signals: list[Signal] = []
    own = run.config["data"] == context.samples.digest
    for name, slot in options.slots.items():
        state = run.signals.get(name, {})
        signal: Signal | None = None
        if slot.is_refreshed:
            if state.get("generation") is not None:
                signal = Live(slot, context)
            elif slot.is_cached:
                signal = Cached(slot, context)
        elif not slot.is_off:
            signal = build_signal(name, slot, context)
            if isinstance(signal, Banked) and isinstance(slot, AttentionConfig) and not own:
                signal = Live(slot, context)
            elif state:
                signal.load_state_dict(state)
        if signal is not None:
            signal.name = name
            signals.append(signal)
    return signals


@torch.no_grad()
def picture(model: MaskedModel, weighed: Weighed, seed: int = 0) -> Image.Image:
    """Draw crops as a run sees them, a row each.

    Without a signal for attention the picture shows what the model attends to in these crops.

    Args:
        seed: of the draw of the patches.
    """
    grid, patch_size = model.config.grid, model.config.patch_size
    crops, blend = weighed.crops, weighed.join.blend_at(weighed.progress)
    weights = blended_weights(weighed.weights, blend)
    shown = {name: found for name, (found, _) in weighed.scores.items()}
    if "attention" not in shown:
        pixels = normalise_images(crops.images)
        shown |= model_scores(["attention"], model.encoder, pixels)
    generator = torch.Generator(crops.images.device).manual_seed(seed)
    batch = weighed.split(model.config, generator)
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
    run_program(main, parsed(Figures, __doc__))
