"""A linear classifier in closed form, as the first weights of a head.

Linear discriminant analysis: features of each class are taken as normally distributed, with one
covariance for all. One pass over the features suffices, and few steps of fine-tuning can't undo
what the classifier knows (compare Kumar et al., arXiv 2202.10054: probe first, then fine-tune).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from famt.train.distributed import Ranks

_SUREST = 0.9  # posterior of a class at its mean; as sure as smoothed labels


@torch.no_grad()
def discriminants(
    features: Iterable[tuple[Tensor, Tensor]], classes: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Weights `[classes, C]` and biases `[classes]` float32 on the CPU, the same on every rank.

    Logits are log posteriors up to a constant, divided by a temperature if classes would be surer
    at their means than a posterior of 0.9, as few images in many dimensions lie far apart. The
    covariance is shrunk towards a multiple of the identity (OAS: Chen et al., IEEE Transactions on
    Signal Processing 58(10), 2010, eq. 23 less its terms in 2/C, as in scikit-learn). A class
    without images gets zero weights and the bias of half an image.

    Args:
        features: batches of this rank, `[B, C]` float and labels `[B]` int64.
    """
    mine: list[Tensor] | None = None
    for batch, labels in features:
        found = _moments(batch, labels, classes)
        mine = [a + b for a, b in zip(mine, found, strict=True)] if mine else [*found]
    everywhere = [each for each in ranks.gather(mine) if each is not None]
    counts, sums, squares = (torch.stack(each).sum(0) for each in zip(*everywhere, strict=True))
    count, mean = counts.sum(), sums.sum(0) / counts.sum()
    seen = counts > 0
    means = torch.where(seen[:, None], sums / counts.clamp_min(1)[:, None], mean)
    covariance = (squares - (means.T * counts) @ means) / count
    weights = torch.linalg.solve(_shrunk(covariance, float(count)), (means - mean).T).T
    priors = (counts.clamp_min(0.5) / count).log()
    biases = priors - (weights * (means + mean)).sum(1) / 2
    scale = _tempered(means[seen] @ weights[seen].T + biases[seen])
    return (scale * weights).float(), (scale * biases).float()


def _moments(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of images and sum of features of each class, and sum of products of features."""
    features = features.double().cpu()
    members = torch.nn.functional.one_hot(labels, classes).double()
    return members.sum(0), members.T @ features, features.T @ features


def _tempered(logits: Tensor) -> Tensor:
    """Factor in (0, 1] for logits `[K, K]` of K classes at the means of each."""
    classes = len(logits)
    if classes == 1:
        return torch.ones(())
    own = logits.diagonal()
    others = (logits.sum(1) - own) / (classes - 1)
    allowed = math.log(_SUREST / ((1 - _SUREST) / (classes - 1)))
    return (allowed / (own - others).mean().clamp_min(1e-6)).clamp(max=1)


def _shrunk(covariance: Tensor, count: float) -> Tensor:
    width = len(covariance)
    trace, squared = covariance.trace(), covariance.square().sum()
    above, below = squared + trace**2, (count + 1) * (squared - trace**2 / width)
    share = (above / below).clamp(0, 1) if below > 0 else torch.ones(())
    identity = torch.eye(width, dtype=covariance.dtype)
    return (1 - share) * covariance + share * (trace / width).clamp_min(1e-12) * identity
