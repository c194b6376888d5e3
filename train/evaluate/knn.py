"""k-nearest-neighbour classification: how good the features are as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.train.evaluate.features import (
    Features,
    Images,
    Value,
    require_labels,
    standard_error,
    top1,
)
from famt.train.evaluate.options import Knn

_QUERIES, _KEYS = 4096, 65536  # similarities of so many images are in memory at a time: 1 GB


def knn(
    encoder: VisionTransformer, train: Images, val: Images, options: Knn
) -> Iterator[tuple[str, Value]]:
    """Top-1 accuracy by the class token, and by the mean of the patch tokens."""
    require_labels(train, val)
    yield from score(train.features(encoder), val.features(encoder), options, train.device)


def score(
    train: Features,
    val: Features,
    options: Knn,
    device: torch.device,
) -> Iterator[tuple[str, Value]]:
    """`knn` on features that are there."""
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    for pooling in ("cls", "mean"):
        predicted = predict(
            getattr(train, pooling).to(device),
            train.labels.to(device),
            getattr(val, pooling).to(device),
            k=options.k,
            temperature=options.temperature,
        ).cpu()
        share = top1(predicted, val.labels, classes)
        yield f"top1_{pooling}", share
        yield f"stderr_{pooling}", standard_error(share, len(predicted))


def predict(
    features: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classify by weighted votes of the nearest neighbours (DINO, section 4.1 and its code's k-NN).

    Args:
        features: `[R, C]` float.
        labels: `[R]` int64.
        queries: `[Q, C]` float.
        k: neighbours that vote; all R if there are fewer.
        temperature: a neighbour of cosine similarity s has exp(s / temperature) votes.

    Returns:
        `[Q]` int64, the class with the most votes.
    """
    classes = int(labels.max()) + 1
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    predicted = []
    for part in queries.split(_QUERIES):
        similarity, nearest = part.new_empty(len(part), 0), labels.new_empty(len(part), 0)
        for keys, names in zip(features.split(_KEYS), labels.split(_KEYS), strict=True):
            found = (part @ keys.T).topk(min(k, len(keys)), dim=1)
            similarity = torch.cat([similarity, found.values], dim=1)
            nearest = torch.cat([nearest, names[found.indices]], dim=1)
            similarity, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            nearest = nearest.gather(1, index)
        # exp(s / T) up to a factor that all of an image's neighbours share: never too large
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        ballots = votes.new_zeros(len(part), classes).scatter_add_(1, nearest, votes)
        predicted.append(ballots.argmax(1))
    return torch.cat(predicted)
