"""Training images of the examples: random crops of the two photos in scikit-learn."""

import numpy as np
import torch
from sklearn.datasets import load_sample_images


def random_crops(size, count):
    """`[count, size, size, 3]` uint8."""
    photos = torch.from_numpy(np.stack(load_sample_images().images))
    crops = []
    for photo in photos[torch.randint(len(photos), (count,))]:
        top = int(torch.randint(photo.shape[0] - size, ()))
        left = int(torch.randint(photo.shape[1] - size, ()))
        crops.append(photo[top : top + size, left : left + size])
    return torch.stack(crops)
