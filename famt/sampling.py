"""From signals to weights, and from weights to which patches are masked, thrown or visible."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from famt.patch_counts import Predicted, Thrown, Visible, patch_counts

# Log-weights beyond those of any positive double (-745 to 710) and any Gumbel draw (-5 to 45).
_NEVER, _ALWAYS = -1e4, 1e4


@dataclass(frozen=True)
class PatchSplit:
    """Patch positions, int64 raster indices: `masked [B, M]`, `thrown [B, T]`, `visible [B, V]`.

    Every row of the three together is a permutation of 0 .. N-1. Visible patches enter the encoder,
    thrown ones enter nothing. Of the masked ones `predicted [B, P]` are reconstructed, all of them
    if left out.
    """

    masked: Tensor
    thrown: Tensor
    visible: Tensor
    predicted: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.predicted is None:
            object.__setattr__(self, "predicted", self.masked)


def patch_weights(signals: Mapping[str, Tensor], exponents: Mapping[str, float]) -> Tensor:
    """Product of signals, each divided by its own mean over the image and raised to its exponent.

    Args:
        signals: name -> `[B, N]`, >= 0; at least one.
        exponents: name -> power of that signal, 1 where the name is absent.

    Returns:
        `[B, N]` float32. A signal that is zero all over an image counts as 1 there.
    """
    weights: Tensor | None = None
    for name, signal in signals.items():
        mean = signal.float().mean(-1, keepdim=True)
        relative = torch.where(mean == 0, 1.0, signal.float() / mean.masked_fill(mean == 0, 1.0))
        factor = relative ** exponents.get(name, 1.0)
        weights = factor if weights is None else weights * factor
    if weights is None:
        raise ValueError("no signal to weigh patches by; uniform weights are torch.ones(B, N)")
    return weights


def sample_patches(
    weights: Tensor,
    mask_ratio: float,
    throw_ratio: float,
    generator: torch.Generator | None = None,
    *,
    visible: Visible = "lightest",
    thrown: Thrown = "heaviest",
    blend: float = 1.0,
) -> PatchSplit:
    """Draw patches without replacement, by weight: first the masked, then the thrown ones.

    Gumbel top-k: sorting `log w + Gumbel noise` draws as if one patch at a time were taken with
    probability proportional to weight (Kool et al., "Stochastic Beams and Where to Find Them",
    ICML 2019, section 3).

    Weights that are no positive number have a meaning of their own: zero is taken only after every
    positive weight, and infinity before every finite one, both at random among themselves; NaN and
    negative weights say nothing and count as the mean of the image's finite, valid ones. An image
    without any valid weight is sampled uniformly.

    Args:
        weights: `[B, N]` float, any scale.
        mask_ratio, throw_ratio: shares of N; see `patch_counts`.
        generator: source of the noise, on the device of `weights`.
        visible: "lightest" are those that the draws leave over (FAMT). "uniform" sets as many aside
            first, each patch alike, so that the encoder sees what MAE's sees, heavy patches among
            it, as hints (AttMask, Kakogeorgiou et al., ECCV 2022); what is left is drawn by weight.
        thrown: "heaviest" are drawn right after the masked ones (FAMT), "lightest" are the last to
            be drawn, and the visible ones lie between. It makes no difference to uniform visible
            patches: the thrown ones are then all that is left.
        blend: in [0, 1], how much the weights count; see `blended_weights`. 0 is uniform, and
            nothing is certain below 1 but by infinite weights.

    Returns:
        the split; within each group patches are in the order drawn.

    Raises:
        ValueError: `weights` is not `[B, N]` float, the ratios leave nothing to mask or see, or
            `blend` is outside [0, 1].
    """
    if weights.ndim != 2 or not weights.is_floating_point():
        raise ValueError(f"weights must be float [B, N], got {weights.dtype} {list(weights.shape)}")
    if not 0 <= blend <= 1:
        raise ValueError(f"blend {blend} must be in [0, 1]")
    n_masked, n_thrown, n_visible = patch_counts(weights.shape[1], mask_ratio, throw_ratio)
    drawn_by = blended_weights(weights.detach(), blend)
    keys = drawn_by.log().clamp(_NEVER, _ALWAYS) + _gumbel(weights, generator)
    if visible == "uniform":
        hints = _gumbel(weights, generator).topk(n_visible, dim=1).indices
        keys = keys.scatter(1, hints, -torch.inf)
    order = keys.argsort(dim=1, descending=True)
    if thrown == "lightest" and visible == "lightest":
        masked, seen, lightest = order.split([n_masked, n_visible, n_thrown], dim=1)
        return PatchSplit(masked, lightest, seen)
    return PatchSplit(*order.split([n_masked, n_thrown, n_visible], dim=1))


def blended_weights(weights: Tensor, blend: float) -> Tensor:
    """What patches are drawn by: `(1 - blend) + blend * w / mean(w)`, or `w` where `blend` is 1.

    Args:
        weights: `[B, N]` float; see `sample_patches` for those that are no positive number.
        blend: in [0, 1].

    Returns:
        `[B, N]` float64, >= 0.
    """
    weights = weights.double()
    silent = weights.isnan() | (weights < 0)
    finite = ~silent & weights.isfinite()
    # The mean relative to the row's largest weight: a plain sum of huge weights could overflow.
    peak = weights.where(finite, 0.0).amax(1, keepdim=True)
    scaled = weights.where(finite, 0.0) / peak.masked_fill(peak == 0, 1.0)
    mean = scaled.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp_min(1) * peak
    filled = torch.where(silent, mean, weights)
    if blend == 0:
        return torch.ones_like(filled)
    if blend < 1:
        relative = torch.where(mean == 0, 1.0, filled / mean.masked_fill(mean == 0, 1.0))
        filled = ((1 - blend) + blend * relative).where(filled.isfinite(), filled)
    return filled


def predict_some(
    split: PatchSplit,
    share: float,
    choice: Predicted = "random",
    generator: torch.Generator | None = None,
) -> PatchSplit:
    """Have only a share of the masked patches reconstructed; the others enter no decoder.

    Args:
        split: of a square grid of patches.
        share: of the masked patches, in (0, 1]; at least one is predicted.
        choice: "random", each alike (CrossMAE, Fu et al., arXiv 2401.14391, "prediction ratio"), or
            "spread" over the image: one at random, then again and again the one that lies
            furthest from all chosen before (Gonzalez, 1985), ties at random. That takes as many
            small operations one after another as patches are chosen.
        generator: as in `sample_patches`; untouched if `share` is 1.

    Returns:
        the split with `predicted` in the order chosen.

    Raises:
        ValueError: `share` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"the predicted share {share} must be in (0, 1]")
    if share == 1:
        return dataclasses.replace(split, predicted=split.masked)
    count = max(1, int(split.masked.shape[1] * share))
    noise = torch.rand(split.masked.shape, device=split.masked.device, generator=generator)
    if choice == "random":
        chosen = noise.topk(count, dim=1).indices
    else:
        patches = sum(group.shape[1] for group in (split.masked, split.thrown, split.visible))
        chosen = _spread(split.masked, round(patches**0.5), count, noise)
    return dataclasses.replace(split, predicted=split.masked.gather(1, chosen))


def loss_weights(weights: Tensor, split: PatchSplit, exponent: float) -> Tensor:
    """How much each predicted patch counts in the loss: its weight to a power.

    Args:
        weights: `[B, N]` float, any scale; what is no finite number of at least 0 counts as the
            mean of the image's valid ones.
        split: whose masked patches have a mean of 1, in each image.
        exponent: 0 or more.

    Returns:
        `[B, P]` float32, >= 0, in the order of `split.predicted`. Where all masked patches of an
        image weigh nothing, each counts 1.
    """
    valid = weights.isfinite() & (weights >= 0)
    known = weights.double().where(valid, 0.0)
    peak = known.amax(1, keepdim=True)
    known = known / peak.masked_fill(peak == 0, 1.0)  # so that no power overflows
    mean = known.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    powers = known.where(valid, mean) ** exponent
    mean = powers.gather(1, split.masked).mean(1, keepdim=True)
    predicted = powers.gather(1, split.predicted) / mean.masked_fill(mean == 0, 1.0)
    return torch.where(mean == 0, 1.0, predicted).float()


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    exponential = torch.empty(like.shape, dtype=torch.float64, device=like.device)
    exponential.exponential_(generator=generator).clamp_min_(torch.finfo(torch.float64).tiny)
    return -exponential.log()


def _spread(masked: Tensor, grid: int, count: int, noise: Tensor) -> Tensor:
    """Columns `[B, count]` of `masked [B, M]`, each furthest from those before.

    `noise [B, M]` in [0, 1) says where to begin; half of it is smaller than any difference of
    squared distances, and decides between equals.
    """
    place = torch.stack([masked // grid, masked % grid], dim=-1).to(noise.dtype)
    nearest = torch.full_like(noise, torch.inf)
    column = noise.argmax(1, keepdim=True)
    chosen = [column]
    for _ in range(count - 1):
        last = place.gather(1, column[..., None].expand(-1, -1, 2))
        nearest = torch.minimum(nearest, (place - last).square().sum(-1))
        nearest = nearest.scatter(1, column, -torch.inf)  # never again
        column = (nearest + noise / 2).argmax(1, keepdim=True)
        chosen.append(column)
    return torch.cat(chosen, dim=1)
