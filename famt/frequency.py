"""Frequency scores of patches: from pixels without a model, or from a model's tokens.

Frequencies are in cycles per image side, so scores do not depend on the resolution, and an image
decoded at half size scores like the full one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from famt.pixel_kinds import BANDS, DEFAULT_KIND, PixelKind, check_pixel_score

# Widths in cycles per image side by which amplitude spectra are smoothed.
_SCALES: dict[str, tuple[float, ...]] = {
    "hypercomplex_fourier": (4.0,),
    "hypercomplex_fourier_scales": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
_SALIENCY_BLUR = 0.04  # of the image side
_FLAT_LAB = 1e-2  # smaller differences of colour count as none
_SPECTRAL_RESIDUAL_SIZE = 64
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def pixel_frequency(
    images: Tensor,
    grid: int,
    kind: PixelKind = DEFAULT_KIND,
    band: tuple[float, float] | None = None,
) -> Tensor:
    """Score every cell of a `grid` x `grid` raster over whole images by its frequency content.

    - `hypercomplex_fourier`: the CIE Lab image with a smoothed amplitude spectrum. The amplitude of
      all three channels together, `A = sqrt(|FL|^2 + |Fa|^2 + |Fb|^2)`, becomes `exp(blur(log A))`
      and the phases stay: what repeats is a peak of A and fades, what is rare remains. The score is
      the squared length of the result, blurred by 0.04 of the side. (Li et al., "Visual Saliency
      Based on Scale-Space Analysis in the Frequency Domain", TPAMI 2013, at one scale, a blur by 4
      cycles. They pair channels as complex numbers; three real transforms are half the work.)
    - `hypercomplex_fourier_scales`: the same at blurs by 0.5 to 16 cycles; an image takes the one
      with the least entropy of its values over their share in a centred window, as the paper does.
    - `frequency_tuned`: distance in CIE Lab of the low-passed image from its mean colour
      (Achanta et al., "Frequency-tuned Salient Region Detection", CVPR 2009, section 3).
    - `lowpass`, `highpass`, `bandpass`: energy of the luminance in a Gaussian pass band, its mean
      removed, smoothed over 3 x 3 cells. The three differ in their default band alone.
    - `spectral_residual`: the log-amplitude spectrum less its local mean, back in pixels, squared
      (Hou & Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, section 3).
    - `border_geodesic`: a saliency prior, not a spectrum. In CIE Lab of the low-passed image, a
      cell's score is the cost of the cheapest path from the image border. A step costs the colour
      difference of two cells; a path starts at the cost of its border cell's difference from the
      rest of the border. Background reaches the border cheaply, objects do not. (The boundary prior
      of Wei et al., "Geodesic Saliency Using Background Priors", ECCV 2012, section 3, on a
      frequency-filtered image.)

    Args:
        images: `[B, 3, H, W]` float in [0, 1], RGB, upright.
        grid: cells a side.
        kind: which score; see the list above.
        band: (low, high) edges of the pass band in cycles per image side, in place of the kind's
            own; `spectral_residual` and the `hypercomplex_fourier` kinds take none.

    Returns:
        `[B, grid, grid]` float32, >= 0, mean 1 an image. An image without content (one colour)
        scores 1 everywhere.

    Raises:
        ValueError: wrong shape or dtype, NaN or infinite pixels, or as of `check_pixel_score`.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be float [B, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    check_pixel_score(grid, kind, band)
    images = images.float()
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite pixels")
    if kind == "spectral_residual":
        return unit_mean(_spectral_residual(images, grid))
    if kind in _SCALES:
        lab = rgb_to_lab(images)
        flat = lab.amax((2, 3)).sub(lab.amin((2, 3))).amax(1) < _FLAT_LAB  # only rounding noise
        saliency = _hypercomplex_fourier(lab, _SCALES[kind])
        blurred = _band_cells(saliency, 0.0, _blur_edge(_SALIENCY_BLUR), grid)
        return unit_mean(blurred.squeeze(1).masked_fill(flat[:, None, None], 0.0))
    low, high = BANDS[kind] if band is None else band
    if kind == "border_geodesic":
        colour = rgb_to_lab(_band_cells(images, low, high, grid).clamp(0, 1))
        return unit_mean(_distance_from_border(colour), _FLAT_LAB)
    tuned = kind == "frequency_tuned"
    wave = _gaussian_band(rgb_to_lab(images) if tuned else _luminance(images), low, high)
    centred = wave - wave.mean(dim=(-2, -1), keepdim=True)
    cells = F.adaptive_avg_pool2d(centred.square().sum(1, keepdim=True).sqrt(), grid)
    if tuned:
        return unit_mean(cells.squeeze(1), _FLAT_LAB)
    return unit_mean(_smooth(cells).squeeze(1))


def token_frequency(tokens: Tensor, cutoff: float = 0.15) -> Tensor:
    """FAMT's frequency score of each token of a transformer's output.

    Gui et al., "Exploring the Coordination of Frequency and Attention in Masked Image Modeling",
    arXiv 2211.15362 v3, section III: a 1-D FFT along the raster-ordered tokens, per channel and
    without shift; the magnitude times `1 - exp(-(j - m0)^2 / (2 d0))` with `m0 = (N - 1) / 2` and
    `d0 = (cutoff N / 2)^2`; the inverse FFT; absolute values summed over channels, over the mean
    token's sum before the filter.

    Args:
        tokens: `[B, N, C]` float, the class token dropped.
        cutoff: width of the suppressed middle of the unshifted spectrum (its highest frequencies),
            as a fraction of N / 2.

    Returns:
        `[B, N]` float32, >= 0. Tokens that are all zero score 0.

    Raises:
        ValueError: `tokens` is not `[B, N, C]`.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be [B, N, C], got {list(tokens.shape)}")
    tokens = tokens.float()
    count = tokens.shape[1]
    position = torch.arange(count, device=tokens.device, dtype=torch.float32) - (count - 1) / 2
    gain = 1 - torch.exp(-(position**2) / (2 * (cutoff * count / 2) ** 2))
    # A real gain scales the magnitude and leaves the phase as it is.
    filtered = torch.fft.ifft(torch.fft.fft(tokens, dim=1) * gain[:, None], dim=1)
    before = tokens.abs().sum(-1).mean(1, keepdim=True)
    return filtered.abs().sum(-1) / before.clamp_min(torch.finfo(torch.float32).tiny)


def unit_mean(scores: Tensor, flat_below: float = 1e-5) -> Tensor:
    """Maps `[B, G, G]`, negative values set to 0, over their means.

    A map whose mean is at most `flat_below`, mere rounding, becomes ones.
    """
    scores = scores.clamp_min(0)
    mean = scores.mean(dim=(-2, -1), keepdim=True)
    flat = mean <= flat_below
    return torch.where(flat, torch.ones_like(scores), scores / mean.masked_fill(flat, 1.0))


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB `[B, 3, H, W]` in [0, 1] to CIE Lab under D65 (IEC 61966-2-1 and CIE 15:2004)."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    to_xyz = images.new_tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    white = images.new_tensor([0.95047, 1.0, 1.08883])
    xyz = torch.einsum("ij,bjhw->bihw", to_xyz / white[:, None], linear)
    delta = 6 / 29
    root = torch.where(
        xyz > delta**3, xyz.clamp_min(delta**3) ** (1 / 3), xyz / (3 * delta**2) + 4 / 29
    )
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _luminance(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)


def _gaussian_band(images: Tensor, low: float, high: float) -> Tensor:
    """Keep frequencies between two Gaussian edges, in cycles per image side; `low` 0 keeps DC."""
    height, width = images.shape[-2:]
    fy = torch.fft.fftfreq(height, d=1 / height, device=images.device)[:, None]
    fx = torch.fft.rfftfreq(width, d=1 / width, device=images.device)[None, :]
    radius2 = fy**2 + fx**2
    gain = torch.exp(-radius2 / (2 * high**2))
    if low > 0:
        gain = gain - torch.exp(-radius2 / (2 * low**2))
    return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(height, width))


def _blur_edge(side_share: float) -> float:
    """Cut-off in cycles of a blur whose standard deviation is this share of the side."""
    return 1 / (2 * math.pi * side_share)


def _hypercomplex_fourier(colour: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Squared length of images with smoothed amplitudes: `[B, C, H, W]` -> `[B, 1, H, W]`.

    Each image takes the best of several scales.
    """
    extent = colour.shape[-2:]
    spectrum = torch.fft.rfft2(colour)
    amplitude = spectrum.abs().square().sum(1, keepdim=True).sqrt()
    floor = 1e-6 * amplitude.amax((2, 3), keepdim=True)  # below is rounding noise
    amplitude = amplitude.maximum(floor.clamp_min(torch.finfo(torch.float32).tiny))
    # Log A is real and even, so its circular smoothing is a product of real transforms.
    cepstrum = torch.fft.irfft2(amplitude.log(), s=extent)
    # Positions in shares of the side: the "frequencies" of a spectrum.
    fy, fx = (torch.fft.fftfreq(length, device=colour.device) for length in extent)
    radius2 = fy[:, None] ** 2 + fx**2
    candidates = []
    for scale in scales:
        window = torch.exp(-radius2 / (2 * _blur_edge(scale) ** 2))
        smooth = torch.fft.rfft2(cepstrum * window).real
        waves = torch.fft.irfft2(spectrum * (smooth.exp() / amplitude), s=extent)
        candidates.append(waves.square().sum(1, keepdim=True))
    if len(scales) == 1:
        return candidates[0]
    blurred = (_gaussian_band(each, 0.0, _blur_edge(_SALIENCY_BLUR)) for each in candidates)
    best = torch.stack([_spread(each.squeeze(1)) for each in blurred]).argmin(0)
    return torch.stack(candidates)[best, torch.arange(len(colour), device=colour.device)]


def _spread(saliency: Tensor) -> Tensor:
    """Entropy of maps' values in 256 bins, in bits, over their share in a centred Gaussian window.

    `[B, H, W]` -> `[B]`. The window's standard deviation is a quarter of each side.
    """
    saliency = saliency.clamp_min(0)
    batch, height, width = saliency.shape
    peak = saliency.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    levels = (saliency / peak * 255).long().flatten(1)
    counts = saliency.new_zeros(batch, 256).scatter_add_(
        1, levels, torch.ones_like(levels, dtype=saliency.dtype)
    )
    entropy = torch.special.entr(counts / (height * width)).sum(1) / math.log(2)
    y, x = (
        torch.exp(-8 * ((torch.arange(n, device=saliency.device) + 0.5) / n - 0.5) ** 2)
        for n in (height, width)
    )
    total = saliency.sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    share = (saliency * (y[:, None] * x)).sum((1, 2)) / total
    return entropy / share.clamp_min(torch.finfo(torch.float32).tiny)


def _spectral_residual(images: Tensor, grid: int) -> Tensor:
    """`[B, 3, H, W]` -> `[B, grid, grid]`, at 64 px as in the paper."""
    size = (_SPECTRAL_RESIDUAL_SIZE, _SPECTRAL_RESIDUAL_SIZE)
    small = F.interpolate(_luminance(images), size=size, mode="bilinear", antialias=True)
    spectrum = torch.fft.fft2(small)
    log_amplitude = spectrum.abs().clamp_min(1e-8).log()
    local_mean = F.avg_pool2d(F.pad(log_amplitude, (1, 1, 1, 1), mode="circular"), 3, 1)
    residual = torch.exp(log_amplitude - local_mean)
    saliency = torch.fft.ifft2(torch.polar(residual, spectrum.angle())).abs() ** 2
    flat = (small.amax((1, 2, 3)) - small.amin((1, 2, 3))) < 1e-4  # its spectrum is rounding noise
    saliency = saliency.masked_fill(flat[:, None, None, None], 0.0)
    return _smooth(F.adaptive_avg_pool2d(saliency, grid)).squeeze(1)


def _distance_from_border(colour: Tensor) -> Tensor:
    """Cheapest 8-connected path from the border to each cell: `[B, C, G, G]` -> `[B, G, G]`."""
    batch, _, grid, _ = colour.shape
    on_border = torch.ones(grid, grid, dtype=torch.bool, device=colour.device)
    on_border[1:-1, 1:-1] = False
    border = colour[:, :, on_border].transpose(1, 2)
    # A path starts at its cell's mean distance to the nearest half of the border: an object that
    # touches the border is not taken for background. The nearest of all is the cell itself, at 0.
    half = border.shape[1] // 2
    between = torch.cdist(border, border, compute_mode="donot_use_mm_for_euclid_dist")
    # NumPy is three times as fast here as torch's topk.
    nearest = np.partition(between.cpu().numpy(), half, axis=-1)[..., : half + 1].sum(-1)
    start = torch.from_numpy(nearest).to(colour.device) / half

    # The batch is the innermost axis, so that the operations below run along memory.
    padded = torch.full((grid + 2, grid + 2, batch), math.inf, device=colour.device)
    distance = padded[1:-1, 1:-1]
    distance[on_border] = start.T
    cells = colour.permute(2, 3, 1, 0).contiguous()
    padded_cells = F.pad(cells, (0, 0, 0, 0, 1, 1, 1, 1))
    steps = []  # for each of 8 neighbours: its distance, as a view, and the cost of the step
    for down, right in [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]:
        rows, columns = slice(down, down + grid), slice(right, right + grid)
        cost = (padded_cells[rows, columns] - cells).square().sum(2).sqrt()
        steps.append((padded[rows, columns], cost))
    while True:  # relax until nothing gets cheaper: the fixed point is the exact distance
        before = distance.clone()
        for neighbour, cost in steps:
            torch.minimum(distance, neighbour + cost, out=distance)
        if torch.equal(before, distance):
            return distance.permute(2, 0, 1)


def _band_cells(images: Tensor, low: float, high: float, grid: int) -> Tensor:
    """Cell means `[B, C, grid, grid]` of `_gaussian_band`, without filtering every pixel.

    A Gaussian low-pass and the mean over a cell are linear and separable: one matrix a side.
    """
    height, width = images.shape[-2:]

    def lowpass(edge: float) -> Tensor:
        rows = _lowpass_means(height, edge, grid, images.device)
        columns = rows if width == height else _lowpass_means(width, edge, grid, images.device)
        return rows @ images @ columns.T

    return lowpass(high) - lowpass(low) if low > 0 else lowpass(high)


def _lowpass_means(length: int, edge: float, cells: int, device: torch.device) -> Tensor:
    """`[cells, length]`: each cell's mean of a line of pixels under a Gaussian low-pass."""
    frequency = torch.fft.rfftfreq(length, d=1 / length, device=device)
    gain = torch.exp(-(frequency**2) / (2 * edge**2))
    identity = torch.eye(length, device=device)
    filtered = torch.fft.irfft(torch.fft.rfft(identity) * gain, n=length)
    return F.adaptive_avg_pool1d(filtered, cells).T


def _smooth(cells: Tensor) -> Tensor:
    """Mean over 3 x 3 cells of `[B, 1, G, G]`, the edge repeated."""
    return F.avg_pool2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, 1)
