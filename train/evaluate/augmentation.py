"""Augmentation for fine-tuning: RandAugment, mixup, CutMix and label smoothing, by timm."""

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
from famt.train.evaluate.evaluators.finetune import Mixing

# At timm's maximum, 10, posterizing keeps 0 bits, which Pillow refuses.
_STRONGEST = 9.99


@dataclass(frozen=True)
class Mixed:
    """A batch of augmented images.

    Attributes:
        images: `[B, 3, S, S]` float32, normalised.
        targets: `[B, classes]` float32; each row sums to 1.
    """

    images: Tensor
    targets: Tensor


class Mixer:
    """Augments images, and mixes the images and labels of a batch.

    Args:
        options: which augmentations, and how strong; each option has a value.
        classes: number of classes.
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
        """Augment and mix a batch; the result is on the device of its images.

        Args:
            images: `[B, S, S, 3]` uint8.
            labels: `[B]` int64.
            draws: numbers that seed all random draws, for example seed, step and rank.
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
