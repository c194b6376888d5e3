"""A vote of the nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.train.evaluate.evaluators.knn import Knn
from famt.train.evaluate.features import (
    Images,
    Results,
    class_count,
    require_labels,
    standard_error,
    top1,
)

_QUERIES, _KEYS = 4096, 65536  # images per block of similarities: 1 GB


def classify(encoder: VisionTransformer, train: Images, val: Images, options: Knn) -> Results:
    """Top-1 accuracy by the class token, and by the mean of the patch tokens."""
    require_labels(train, val)
    known, asked = train.features(encoder), val.features(encoder)
    for pooling in ("cls", "mean"):
        predicted = predict(
            getattr(known, pooling).to(train.device),
            known.labels.to(train.device),
            getattr(asked, pooling).to(train.device),
            k=options.k,
            temperature=options.temperature,
        )
        share = top1(predicted.cpu(), asked.labels)
        yield f"top1_{pooling}", share
        yield f"stderr_{pooling}", standard_error(share, len(val))


def predict(
    features: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classify by a weighted vote of the nearest neighbours, as DINO's code does (section 4.1).

    Args:
        features: `[R, C]` float.
        labels: `[R]` int64.
        queries: `[Q, C]` float.
        k: number of neighbours that vote; at most R do.
        temperature: a neighbour at cosine similarity s has exp(s / temperature) votes.

    Returns:
        `[Q]` int64, the class with the most votes.
    """
    classes = class_count(labels)
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
        # exp(s / T) up to a factor per image, so that it can't overflow
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        ballots = votes.new_zeros(len(part), classes).scatter_add_(1, nearest, votes)
        predicted.append(ballots.argmax(1))
    return torch.cat(predicted)
