"""Linear classifiers on frozen features: class token, mean of patch tokens, attentive pooling.

For each pooling all learning rates and penalties are trained side by side on the same stored
features. The setting that does best on held-out training images is trained again on the whole
training set, then tested. The test images choose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from famt.pipeline.errors import UserError
from famt.pipeline.progress import progress_bar
from famt.train.evaluate.evaluators.probe import Pooling, Probe
from famt.train.evaluate.features import (
    Features,
    Images,
    Results,
    class_count,
    require_labels,
    standard_error,
    top1,
)


@dataclass(frozen=True)
class Setting:
    """How one classifier is trained."""

    pooling: Pooling
    learning_rate: float
    penalty: float


def probe(encoder: VisionTransformer, train: Images, val: Images, options: Probe) -> Results:
    """Top-1 accuracy of the classifier chosen by held-out images, and of the best of each pooling,
    with standard errors and the settings chosen."""
    require_labels(train, val)
    keep = "attentive" in options.poolings
    known, asked = (each.features(encoder, tokens=keep) for each in (train, val))
    return score(known, asked, options, encoder.blocks[-1].attn.num_heads, train.device)


def score(
    train: Features, val: Features, options: Probe, heads: int, device: torch.device
) -> Results:
    """The measures of a probe; attentive pooling has `heads`."""
    classes = class_count(train.labels, val.labels)
    chosen = choose(train, options, classes, heads, device)
    everything = torch.arange(len(train.labels))
    classifiers = fit(train, everything, list(chosen), options, classes, heads, device)
    predicted = classifiers.logits(val, options.batch_size, device).argmax(-1)
    shares = [top1(each, val.labels) for each in predicted]
    best = max(range(len(shares)), key=list(chosen.values()).__getitem__)
    yield "top1", shares[best]
    yield "stderr", standard_error(shares[best], len(val.labels))
    yield "pooling", list(chosen)[best].pooling
    for share, (setting, held_out) in zip(shares, chosen.items(), strict=True):
        yield f"top1_{setting.pooling}", share
        yield f"stderr_{setting.pooling}", standard_error(share, len(val.labels))
        yield f"held_out_top1_{setting.pooling}", held_out
        yield f"learning_rate_{setting.pooling}", setting.learning_rate
        yield f"penalty_{setting.pooling}", setting.penalty


def choose(
    train: Features, options: Probe, classes: int, heads: int, device: torch.device
) -> dict[Setting, float]:
    """The best setting of each pooling, with its top-1 accuracy on held-out training images.

    Raises:
        UserError: see `part`.
    """
    kept, held_out = part(train.labels, options.hold_out, options.seed)
    settings = [
        Setting(*each)
        for each in itertools.product(options.poolings, options.learning_rates, options.penalties)
    ]
    classifiers = fit(train, kept, settings, options, classes, heads, device)
    tested = train.take(held_out)
    logits = classifiers.logits(tested, options.batch_size, device)
    losses = [float(F.cross_entropy(each, tested.labels)) for each in logits]
    shares = [top1(each, tested.labels) for each in logits.argmax(-1)]
    chosen = {}
    for pooling in options.poolings:
        mine = [n for n, setting in enumerate(settings) if setting.pooling == pooling]
        best = max(mine, key=lambda n: (shares[n], -losses[n]))
        chosen[settings[best]] = shares[best]
    return chosen


def part(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows to hold out, a `share` of every class.

    Raises:
        UserError: too few images for both.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    shares = (torch.arange(len(labels) + 1, dtype=torch.float64) * share).floor()
    is_held_out = shares[1:] > shares[:-1]
    if is_held_out.sum() in (0, len(labels)):
        raise UserError(
            f"{len(labels)} labelled images are too few to hold out {share:.0%} of them"
        )
    return by_class[~is_held_out], by_class[is_held_out]


def fit(
    features: Features,
    rows: Tensor,
    settings: Sequence[Setting],
    options: Probe,
    classes: int,
    heads: int,
    device: torch.device,
    *,
    progress: bool = True,
) -> Classifiers:
    """Train a classifier for each setting on the images `rows`, all on the same batches."""
    classifiers = Classifiers(features, rows, settings, classes, heads).to(device)
    optimizer = torch.optim.Adam(classifiers.groups(), betas=(0.9, 0.99), fused=True)
    count = len(rows)
    steps_per_epoch = -(-count // options.step_images)
    epochs = max(options.epochs, -(-options.steps // steps_per_epoch))
    steps = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(options.seed)
    with progress_bar(
        total=steps, desc=f"{len(settings)} classifiers", disable=not progress
    ) as bar:
        for _ in range(epochs):
            for drawn in torch.randperm(count, generator=generator).split(options.step_images):
                batch = features.take(rows[drawn])
                logits = classifiers(batch, device)
                labels = batch.labels.to(device).repeat(len(settings))
                # The sum of the classifiers' mean losses, so that they don't affect each other.
                loss = F.cross_entropy(logits.flatten(0, 1), labels) * len(settings)
                (loss + classifiers.penalty()).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.update()
    return classifiers.eval()


class Classifiers(nn.Module):
    """Linear classifiers trained side by side, on standardised features.

    MAE standardises its features for linear probing (appendix A.1). In addition, weights lie on the
    principal axes of the features, each scaled so that loss and penalty together curve about alike
    along all axes. The minimum is the same, but a few hundred steps reach it; along the channels,
    thousands do not.

    The queries of attentive pooling start at zero, that is, at the mean of the patches.

    Args:
        features, rows: the images to standardise by and to learn from.
        settings: one for each classifier.
        classes: number of classes.
        heads: slices of attentive pooling.
    """

    def __init__(
        self,
        features: Features,
        rows: Tensor,
        settings: Sequence[Setting],
        classes: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.penalties: Tensor
        self.units: Tensor
        width = features.cls.shape[1]
        self.settings = settings
        curvature = {}
        for name in ("cls", "mean"):
            known = getattr(features, name)[rows]
            deviation, centre = torch.std_mean(known, dim=0, correction=0)
            self.register_buffer(f"{name}_centre", centre)
            self.register_buffer(f"{name}_scale", deviation.clamp_min(1e-6))
            known = self._standardise(known, name)
            curvature[name], axes = torch.linalg.eigh(known.T @ known / len(rows))
            self.register_buffer(f"{name}_axes", axes)
        penalty = torch.tensor([setting.penalty / len(rows) for setting in settings])
        self.register_buffer("penalties", penalty)
        variance = torch.stack([curvature[_source(each.pooling)] for each in settings])
        # The curvature of the cross-entropy is at most a quarter of an axis's variance.
        self.register_buffer(
            "units", (variance.clamp_min(1e-6) + 10 * penalty[:, None]).rsqrt()[..., None]
        )
        self.weights = nn.ParameterList(torch.zeros(width, classes) for _ in settings)
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in settings)
        self.queries = nn.ParameterDict(
            {
                str(n): torch.zeros(heads, width)
                for n, setting in enumerate(settings)
                if setting.pooling == "attentive"
            }
        )

    def groups(self) -> list[dict]:
        """Parameter groups for the optimiser, with each classifier's learning rate."""
        groups = []
        for n, setting in enumerate(self.settings):
            queries = [self.queries[str(n)]] if str(n) in self.queries else []
            parameters = [self.weights[n], self.biases[n], *queries]
            groups.append({"params": parameters, "lr": setting.learning_rate})
        return groups

    def penalty(self) -> Tensor:
        """Sum of all classifiers' penalties, in units of their mean cross-entropy."""
        weights = torch.stack(list(self.weights)) * self.units
        return (self.penalties * weights.square().sum((1, 2))).sum() / 2

    def forward(self, features: Features, device: torch.device) -> Tensor:
        """Logits `[settings, B, classes]`."""
        logits: dict[int, Tensor] = {}
        for pooling in {setting.pooling for setting in self.settings}:
            mine = [n for n, each in enumerate(self.settings) if each.pooling == pooling]
            source = _source(pooling)
            if pooling == "attentive":
                assert features.tokens is not None
                tokens = features.tokens.to(device).float()
                queries = torch.stack([self.queries[str(n)] for n in mine])
                # Means of standardised tokens, without standardising each token.
                pooled = attentive_pool(tokens, queries / getattr(self, f"{source}_scale"))
            else:
                pooled = getattr(features, source).to(device)
            weights = torch.stack([self.weights[n] for n in mine]) * self.units[mine]
            biases = torch.stack([self.biases[n] for n in mine])[:, None]
            inputs = self._standardise(pooled, source) @ getattr(self, f"{source}_axes")
            logits |= zip(mine, inputs @ weights + biases, strict=True)
        return torch.stack([logits[n] for n in range(len(self.settings))])

    def _standardise(self, features: Tensor, name: str) -> Tensor:
        return (features - getattr(self, f"{name}_centre")) / getattr(self, f"{name}_scale")

    @torch.inference_mode()
    def logits(self, features: Features, batch_size: int, device: torch.device) -> Tensor:
        """Logits `[settings, R, classes]` of all images, on the CPU."""
        rows = torch.arange(len(features.labels)).split(batch_size)
        return torch.cat([self(features.take(each), device).cpu() for each in rows], dim=1)


def attentive_pool(tokens: Tensor, queries: Tensor) -> Tensor:
    """Means of patch tokens under attention: multi-head attention with one query, which includes
    the key map, and no value map.

    Args:
        tokens: `[B, N, C]` float.
        queries: `[S, H, C]`, of S independent poolings; H divides C.

    Returns:
        `[S, B, C]`; slice h of the channels has weights softmax_n(q_h . x_n / sqrt(C)).
    """
    batch, count, width = tokens.shape
    heads = queries.shape[1]
    scores = torch.einsum("bnc,shc->sbhn", tokens, queries) / width**0.5
    slices = tokens.view(batch, count, heads, -1)
    return torch.einsum("sbhn,bnhd->sbhd", scores.softmax(-1), slices).flatten(2)


def _source(pooling: Pooling) -> Literal["cls", "mean"]:
    """The features whose statistics standardise those of a pooling."""
    return "cls" if pooling == "cls" else "mean"
