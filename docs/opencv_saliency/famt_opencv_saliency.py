"""OpenCV's fine-grained saliency as a score kind of FAMT."""

import cv2
import numpy as np
import torch
from torch import Tensor


def saliency(images: Tensor, grid: int) -> Tensor:
    """Mean saliency of every cell (Montabone & Soto, Image and Vision Computing 28, 2010).

    Args:
        images: `[B, S, S, 3]` uint8, RGB.
        grid: cells a side.

    Returns:
        `[B, grid, grid]` float32, >= 0.
    """
    detector = cv2.saliency.StaticSaliencyFineGrained_create()
    maps = []
    for image in images.numpy():
        _, found = detector.computeSaliency(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        maps.append(cv2.resize(found, (grid, grid), interpolation=cv2.INTER_AREA))
    return torch.from_numpy(np.stack(maps))
