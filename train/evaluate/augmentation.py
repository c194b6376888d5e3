"""Images and classes, blurred for fine-tuning: RandAugment, mixup, CutMix, label smoothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from famt.patches import normalise_images
from famt.train.evaluate.options import Mixing

# At timm's full 10 a posterized image keeps 0 bits, which Pillow refuses.
_STRONGEST = 9.99


@dataclass(frozen=True)
class Mixed:
    """A batch of blurred images.

    Attributes:
        images: `[B, 3, S, S]` float32, normalised.
        targets: `[B, classes]` float32, each of sum 1.
    """

    images: Tensor
    targets: Tensor


class Mixer:
    """Augments each image and mixes a batch's images and classes, as timm does.

    Args:
        options: what is done, and how much, each option with a value.
        classes: how many there are.
    """

    def __init__(self, options: Mixing, classes: int) -> None:
        self._augment = (
            rand_augment_transform(options.randaugment, {"magnitude_max": _STRONGEST})
            if options.randaugment
            else None
        )
        self._mixup = Mixup(
            options.mixup,
            options.cutmix,
            prob=1.0 if options.mixup or options.cutmix else 0.0,
            label_smoothing=options.label_smoothing,
            num_classes=classes,
        )

    def mix(self, images: Tensor, labels: Tensor, draws: Sequence[int]) -> Mixed:
        """A batch for the model, on the device of its images.

        Args:
            images: `[B, S, S, 3]` uint8.
            labels: `[B]` int64.
            draws: numbers that alone decide what is drawn at random: seed, step and rank, say.
        """
        first, second = np.random.SeedSequence(draws).generate_state(2).tolist()
        random.seed(first)
        np.random.seed(second)  # noqa: NPY002 - timm draws from it
        if self._augment is not None:
            pictures = [
                np.asarray(self._augment(Image.fromarray(each))) for each in images.cpu().numpy()
            ]
            images = torch.from_numpy(np.stack(pictures)).to(images.device)
        return Mixed(*self._mixup(normalise_images(images), labels.to(images.device)))
