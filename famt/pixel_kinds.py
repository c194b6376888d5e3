"""Kinds of pixel score, by name, and their parameters."""

from __future__ import annotations

import math
from typing import Literal, get_args

PixelKind = Literal[
    "hypercomplex_fourier",
    "hypercomplex_fourier_scales",
    "frequency_tuned",
    "lowpass",
    "highpass",
    "bandpass",
    "spectral_residual",
    "border_geodesic",
]
PIXEL_KINDS: tuple[PixelKind, ...] = get_args(PixelKind)
DEFAULT_KIND: PixelKind = "hypercomplex_fourier"

# (low, high) edges of the Gaussian pass band, in cycles per image side.
BANDS: dict[str, tuple[float, float]] = {
    "lowpass": (0.0, 6.7),
    "highpass": (6.7, math.inf),
    "bandpass": (4.5, 22.4),
    "frequency_tuned": (0.0, 24.0),
    "border_geodesic": (0.0, 8.0),
}

_LEAST_EDGE = 0.01  # cycles per side; the square of a tiny one would be 0


def check_pixel_score(grid: int, kind: str, band: tuple[float, float] | None) -> None:
    """Refuse parameters that `pixel_frequency` can't compute.

    Raises:
        ValueError: names the parameter, and its bounds.
    """
    if grid < 2:
        raise ValueError(f"grid must be at least 2 cells a side, got {grid}")
    if kind not in PIXEL_KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(PIXEL_KINDS)}")
    if band is None:
        return
    if kind not in BANDS:
        raise ValueError(f"{kind} looks at the whole spectrum and takes no band")
    low, high = band
    if not 0 <= low < high or any(0 < edge < _LEAST_EDGE for edge in band):
        raise ValueError(
            f"band must be 0 <= low < high, no edge between 0 and {_LEAST_EDGE}, got {low} {high}"
        )
