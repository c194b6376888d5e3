"""From signals to weights of patches, and from weights to masked, thrown and visible ones."""

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

    Each row of the three together is a permutation of 0 .. N-1. Visible patches enter the encoder,
    thrown ones nothing. `predicted [B, P]` are the masked patches to reconstruct, all if left out.
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
        `[B, N]` float32. A signal that is zero on a whole image counts as 1 there.
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

    Gumbel top-k: sorting `log w + Gumbel noise` is equivalent to drawing one patch at a time with
    probability proportional to weight (Kool et al., "Stochastic Beams and Where to Find Them",
    ICML 2019, section 3).

    Degenerate weights: zeros are drawn after all positive weights, infinities before all finite
    ones, both uniformly among themselves. NaN and negative weights count as the mean of the image's
    finite, valid ones. An image without a valid weight is sampled uniformly.

    Args:
        weights: `[B, N]` float, any scale.
        mask_ratio, throw_ratio: shares of N; see `patch_counts`.
        generator: source of the noise, on the device of `weights`.
        visible: "lightest" are the patches left over by the draws (FAMT). "uniform" draws them
            first, uniformly, so that the encoder sees some heavy patches, as hints (AttMask,
            Kakogeorgiou et al., ECCV 2022); the others are then drawn by weight.
        thrown: "heaviest" are drawn right after the masked ones (FAMT); "lightest" are drawn last,
            after the visible ones. No difference if `visible` is "uniform".
        blend: in [0, 1], influence of the weights; see `blended_weights`. 0 draws uniformly; below
            1 only infinite weights make a draw certain.

    Returns:
        the split; patches of each group in the order drawn.

    Raises:
        ValueError: `weights` is not `[B, N]` float, the ratios leave no masked or no visible patch,
            or `blend` is outside [0, 1].
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
    """Weights to draw by: `(1 - blend) + blend * w / mean(w)`, or `w` if `blend` is 1.

    Args:
        weights: `[B, N]` float; see `sample_patches` for degenerate ones.
        blend: in [0, 1].

    Returns:
        `[B, N]` float64, >= 0.
    """
    weights = weights.double()
    silent = weights.isnan() | (weights < 0)
    finite = ~silent & weights.isfinite()
    # The mean relative to the row's largest weight, since a sum of huge weights could overflow.
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
    """Choose a share of the masked patches to predict; the others do not enter the decoder.

    Args:
        split: of a square grid of patches.
        share: of the masked patches, in (0, 1]; at least one is predicted.
        choice: "random" draws uniformly (CrossMAE, Fu et al., arXiv 2401.14391, "prediction
            ratio"). "spread" takes one at random, then repeatedly the one furthest from all chosen
            (Gonzalez, 1985), ties at random: as many small sequential steps as patches.
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
    """Factor of each predicted patch in the loss: its weight to a power, mean 1 an image.

    Args:
        weights: `[B, N]` float, any scale; negative and non-finite ones count as the mean of the
            image's valid ones.
        split: the mean is over its masked patches.
        exponent: 0 or more.

    Returns:
        `[B, P]` float32, >= 0, in the order of `split.predicted`; ones if all masked patches of an
        image weigh 0.
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

    `noise [B, M]` in [0, 1) chooses the first, and breaks ties: half of it is smaller than any
    difference of squared distances.
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
