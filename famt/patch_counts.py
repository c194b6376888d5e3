"""Policies for choosing patches, by name, and the number of patches in each group."""

from __future__ import annotations

from typing import Literal

Visible = Literal["lightest", "uniform"]
Thrown = Literal["heaviest", "lightest"]
Predicted = Literal["random", "spread"]


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
