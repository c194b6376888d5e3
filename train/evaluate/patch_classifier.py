"""Semantic segmentation by a linear classifier of the patch tokens of a frozen encoder."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from famt.patches import normalise_images
from famt.pipeline.errors import UserError
from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.options import WholeView
from famt.pipeline.sharding.segmentation_masks import IGNORED, crop_masks, decode_mask, read_masks
from famt.train.evaluate.evaluators.segment import Segment
from famt.train.evaluate.features import Images, Results, warn_of_unlearned


def segment(encoder: VisionTransformer, train: Images, val: Images, options: Segment) -> Results:
    """Mean intersection over union (IoU), and the share of correct pixels.

    Tests use whole images, squashed to the encoder's square. Classes that occur neither in masks
    nor in predictions do not count.
    """
    masks = {images.name: read_masks(images.table) for images in (train, val)}
    shown = {
        name: torch.cat([decode_mask(png).unique() for png in known]).unique()
        for name, known in masks.items()
    }
    learned, tested = (shown[each][shown[each] != IGNORED].long() for each in ("train", "val"))
    if len(learned) < 2:
        raise UserError(
            f"the masks of --train have {len(learned)} class(es); an evaluation needs at least two"
        )
    warn_of_unlearned(val, learned, tested)
    classes = 1 + int(max(learned.max(), tested.max()))
    yield "classes", classes
    head = fit(encoder, train, masks["train"], classes, options)
    metrics = {
        "miou": MulticlassJaccardIndex(classes, ignore_index=IGNORED),
        "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
    }
    with torch.inference_mode():
        for crops in val.crops(WholeView()):
            predicted = _logits(encoder, head, crops).argmax(1).cpu()
            truth = _truth(masks["val"], crops)
            for metric in metrics.values():
                metric.update(predicted, truth)
    for name, metric in metrics.items():
        yield name, float(metric.compute())


def fit(
    encoder: VisionTransformer, train: Images, masks: list[bytes], classes: int, options: Segment
) -> nn.Module:
    """Train a linear map from standardised patch tokens `[B, C, g, g]` to class logits."""
    torch.manual_seed(options.seed)
    head = nn.Sequential(
        nn.BatchNorm2d(encoder.embed_dim, affine=False), nn.Conv2d(encoder.embed_dim, classes, 1)
    ).to(train.device)
    optimizer = torch.optim.Adam(head.parameters(), options.learning_rate)
    drawn = dataclasses.replace(train, batch_size=min(options.step_images, len(train)))
    steps_per_epoch = math.ceil(len(train) / drawn.batch_size)
    epochs = max(options.epochs, math.ceil(options.steps / steps_per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    for crops in drawn.crops(options.view, epochs=epochs, shuffle=True, seed=options.seed):
        logits = _logits(encoder, head, crops)
        truth = _truth(masks, crops).to(train.device)
        # A crop may show only unlabelled pixels, whose mean loss would be NaN.
        losses = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        (losses / (truth != IGNORED).sum().clamp_min(1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return head.eval()


def _logits(encoder: VisionTransformer, head: nn.Module, crops: CropBatch) -> Tensor:
    """Logits `[B, classes, S, S]`, interpolated between the centres of the patches."""
    with torch.no_grad():
        tokens = encoder.forward_features(normalise_images(crops.images)).float()
    grid = encoder.patch_embed.grid_size
    patches = tokens[:, encoder.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
    return F.interpolate(head(patches), size=crops.images.shape[1:3], mode="bilinear")


def _truth(masks: list[bytes], crops: CropBatch) -> Tensor:
    """The masks of crops, `[B, S, S]` int64 on the CPU."""
    of_crops = [masks[row] for row in crops.rows.tolist()]
    return crop_masks(of_crops, crops.windows, crops.flips, crops.images.shape[1])
