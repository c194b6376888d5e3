"""From signals to weights, and from weights to which patches are masked, thrown or visible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Log-weights beyond those of any positive double (-745 to 710) and any Gumbel draw (-5 to 45).
_NEVER, _ALWAYS = -1e4, 1e4


@dataclass(frozen=True)
class PatchSplit:
    """Patch positions, int64 raster indices: `masked [B, M]`, `thrown [B, T]`, `visible [B, V]`.

    Every row of the three together is a permutation of 0 .. N-1. Masked patches are reconstructed,
    thrown ones enter nothing, visible ones enter the encoder.
    """

    masked: Tensor
    thrown: Tensor
    visible: Tensor


def patch_counts(patches: int, mask_ratio: float, throw_ratio: float) -> tuple[int, int, int]:
    """Numbers (masked, thrown, visible) of `patches`, rounded as in the published FAMT code.

    `masked = int(N * mask)`, `visible = N - int(N * (mask + throw))`: 45 % and 40 % of 196 are
    88 masked, 78 thrown and 30 visible.

    Raises:
        ValueError: a ratio outside [0, 1), or nothing left to mask or to see.
    """
    if not (0 <= mask_ratio < 1 and 0 <= throw_ratio < 1 and mask_ratio + throw_ratio < 1):
        raise ValueError(
            f"mask ratio {mask_ratio} and throw ratio {throw_ratio} must be at least 0, and "
            "together below 1"
        )
    masked = int(patches * mask_ratio)
    visible = patches - int(patches * (mask_ratio + throw_ratio))
    if masked < 1 or visible < 1:
        raise ValueError(
            f"of {patches} patches, mask ratio {mask_ratio} and throw ratio {throw_ratio} leave "
            f"{masked} masked and {visible} visible; both must be at least 1"
        )
    return masked, patches - masked - visible, visible


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

    Returns:
        the split; within each group patches are in the order drawn.

    Raises:
        ValueError: `weights` is not `[B, N]` float, or the ratios leave nothing to mask or see.
    """
    if weights.ndim != 2 or not weights.is_floating_point():
        raise ValueError(f"weights must be float [B, N], got {weights.dtype} {list(weights.shape)}")
    masked, thrown, _ = patch_counts(weights.shape[1], mask_ratio, throw_ratio)
    exponential = torch.empty(weights.shape, dtype=torch.float64, device=weights.device)
    exponential.exponential_(generator=generator).clamp_min_(torch.finfo(torch.float64).tiny)
    order = (_log_weights(weights.detach()) - exponential.log()).argsort(dim=1, descending=True)
    return PatchSplit(*order.split([masked, thrown, order.shape[1] - masked - thrown], dim=1))


def _log_weights(weights: Tensor) -> Tensor:
    weights = weights.double()
    silent = weights.isnan() | (weights < 0)
    finite = ~silent & weights.isfinite()
    # The mean relative to the row's largest weight: a plain sum of huge weights could overflow.
    peak = weights.where(finite, 0.0).amax(1, keepdim=True)
    scaled = weights.where(finite, 0.0) / peak.masked_fill(peak == 0, 1.0)
    mean = scaled.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp_min(1) * peak
    filled = torch.where(silent, mean, weights)
    return filled.log().clamp(_NEVER, _ALWAYS)
