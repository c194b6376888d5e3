import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse.csgraph
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.frequency import (
    _band_cells,
    _distance_from_border,
    _gaussian_band,
    _hypercomplex_fourier,
    pixel_frequency,
    rgb_to_lab,
    token_frequency,
)
from famt.pixel_kinds import DEFAULT_KIND, PIXEL_KINDS


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    grid=st.integers(2, 16),
)
def test_every_kind_gives_finite_scores_of_mean_one(kind, seed, height, width, grid):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    scores = pixel_frequency(images, grid, kind)
    assert scores.shape == (2, grid, grid)
    assert scores.dtype == torch.float32
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.mean((1, 2)), torch.ones(2))


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_an_image_of_one_colour_scores_one_everywhere(kind, level):
    scores = pixel_frequency(torch.full((1, 3, 56, 56), level), 14, kind)
    assert (scores == 1).all()


def test_gaussian_band_equals_a_naive_fourier_sum():
    size, low, high = 12, 1.5, 4.0
    image = np.random.default_rng(0).random((size, size))
    x = np.arange(size)
    expected = np.zeros((size, size), complex)
    for v in range(size):
        for u in range(size):
            fv, fu = (f if f <= size // 2 else f - size for f in (v, u))
            wave = np.exp(2j * np.pi * (v * x[:, None] + u * x[None, :]) / size)
            coefficient = (image * wave.conj()).sum() / size**2
            r2 = fv**2 + fu**2
            gain = math.exp(-r2 / (2 * high**2)) - math.exp(-r2 / (2 * low**2))
            expected += coefficient * gain * wave
    filtered = _gaussian_band(torch.from_numpy(image)[None, None], low, high)
    np.testing.assert_allclose(filtered[0, 0].numpy(), expected.real, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "seen", "unseen"),
    [("lowpass", 3, 30), ("highpass", 24, 2), ("bandpass", 12, 1), ("bandpass", 12, 54)],
)
def test_a_band_passes_its_own_frequencies(kind, seen, unseen):
    size = 112
    x = torch.arange(size) / size
    waves = [torch.sin(2 * math.pi * cycles * x) for cycles in (seen, unseen)]
    image = torch.where((x < 0.5)[:, None], waves[0], waves[1])  # the seen one fills the upper half
    scores = pixel_frequency((image * 0.4 + 0.5).expand(1, 3, size, size), 14, kind)[0]
    assert scores[2:5].mean() > 2 * scores[9:12].mean()


def test_distance_from_border_equals_dijkstra():
    grid = 6
    colour = torch.rand(1, 3, grid, grid, generator=torch.Generator().manual_seed(1))
    cells = [(y, x) for y in range(grid) for x in range(grid)]
    at = {cell: colour[0, :, cell[0], cell[1]].double().numpy() for cell in cells}
    border = [c for c in cells if 0 in c or grid - 1 in c]
    graph = np.zeros((len(cells) + 1, len(cells) + 1))
    for a, cell in enumerate(cells):
        for b, other in enumerate(cells):
            if a != b and max(abs(cell[0] - other[0]), abs(cell[1] - other[1])) == 1:
                graph[a, b] = np.linalg.norm(at[cell] - at[other])
        if cell in border:
            others = sorted(np.linalg.norm(at[cell] - at[o]) for o in border if o != cell)
            graph[len(cells), a] = np.mean(others[: len(border) // 2])
    expected = scipy.sparse.csgraph.dijkstra(graph, indices=len(cells))[:-1].reshape(grid, grid)
    np.testing.assert_allclose(_distance_from_border(colour)[0].numpy(), expected, rtol=1e-5)


def _wrapped_blur(length, sigma):
    """Matrix of a Gaussian blur by `sigma` samples around the edges, as a sum of waves."""
    f = np.minimum(np.arange(length), length - np.arange(length)) / length
    gain = np.exp(-2 * np.pi**2 * sigma**2 * f**2)
    matrix = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            turns = 2 * np.pi * np.arange(length) * (i - j) / length
            matrix[i, j] = (gain * np.cos(turns)).sum() / length
    return matrix


def _slow_hypercomplex(lab, sigma):
    """`[3, S, S]` -> `[S, S]`: by whole transforms, channel by channel."""
    blur = _wrapped_blur(lab.shape[-1], sigma)
    spectra = [np.fft.fft2(channel) for channel in lab]
    amplitude = np.sqrt(sum(np.abs(each) ** 2 for each in spectra))
    smooth = np.exp(blur @ np.log(amplitude) @ blur.T)
    return sum(np.abs(np.fft.ifft2(each / amplitude * smooth)) ** 2 for each in spectra)


@pytest.mark.parametrize("kind", ["hypercomplex_fourier", "hypercomplex_fourier_scales"])
def test_hypercomplex_fourier_equals_slow_loops_over_images_and_scales(kind):
    size, grid = 32, 8
    coarse = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = (images + 0.1 * noise) / 1.1
    blur = _wrapped_blur(size, 0.04 * size)
    away = ((np.arange(size) + 0.5) / size - 0.5) / 0.25
    window = np.exp(-(away[:, None] ** 2 + away**2) / 2)
    expected = []
    for lab in rgb_to_lab(images).double().numpy():
        candidates = []
        for sigma in [4] if kind == "hypercomplex_fourier" else [0.5, 1, 2, 4, 8, 16]:
            saliency = blur @ _slow_hypercomplex(lab, sigma) @ blur.T
            counts = np.bincount((saliency / saliency.max() * 255).astype(int).ravel())
            share = counts[counts > 0] / size**2
            entropy = -(share * np.log2(share)).sum()
            centred = (saliency * window).sum() / saliency.sum()
            candidates.append((entropy / centred, saliency))
        best = min(candidates, key=lambda each: each[0])[1]
        cells = best.reshape(grid, size // grid, grid, size // grid).mean((1, 3))
        expected.append(cells / cells.mean())
    scores = pixel_frequency(images, grid, kind)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-3)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    factor=st.floats(0.1, 10),
)
def test_hypercomplex_fourier_grows_with_the_square_of_its_colours(seed, height, width, factor):
    colour = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    for scales in [(4.0,), (1.0, 8.0)]:
        once = _hypercomplex_fourier(colour, scales)
        torch.testing.assert_close(
            _hypercomplex_fourier(colour * factor, scales) / factor**2, once, rtol=1e-2, atol=1e-3
        )


def test_hypercomplex_fourier_prefers_the_odd_one_out_of_a_pattern():
    tile = torch.zeros(3, 8, 8)
    tile[:, 2:6, 2:6] = 0.8
    image = tile.repeat(1, 8, 8)[None]
    image[0, 1:, 32:40, 16:24] = 0.0  # one square of 64 is red
    scores = pixel_frequency(image, 8)[0]
    assert scores.argmax() == 4 * 8 + 2


def test_frequency_tuned_equals_slow_loops_over_images_and_pixels():
    size, grid = 16, 4
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    blur = _wrapped_blur(size, size / (2 * np.pi * 24))  # cuts off at 24 cycles
    expected = np.zeros((2, grid, grid))
    for number, lab in enumerate(rgb_to_lab(images).double().numpy()):
        mean = lab.mean((1, 2))
        smooth = [blur @ channel @ blur.T for channel in lab]
        for y in range(size):
            for x in range(size):
                distance = math.sqrt(sum((smooth[c][y, x] - mean[c]) ** 2 for c in range(3)))
                expected[number, y // 4, x // 4] += distance
    expected /= expected.mean((1, 2), keepdims=True)
    scores = pixel_frequency(images, grid, "frequency_tuned")
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("axis", [-2, -1])
def test_a_flipped_image_has_a_flipped_score(kind, axis):
    images = torch.rand(2, 3, 56, 42, generator=torch.Generator().manual_seed(0))
    flipped = pixel_frequency(images.flip(axis), 14, kind).flip(axis)
    torch.testing.assert_close(flipped, pixel_frequency(images, 14, kind), rtol=1e-3, atol=1e-3)


def test_border_geodesic_finds_an_object_anywhere_even_at_the_border():
    for top, left in [(16, 16), (30, 4), (0, 24), (40, 40)]:
        image = torch.zeros(1, 3, 56, 56)
        image[:, 1] = torch.linspace(0.3, 0.5, 56)  # a shaded background
        image[:, 0, top : top + 16, left : left + 16] = 0.9
        scores = pixel_frequency(image, 14, "border_geodesic")[0]
        inside = torch.zeros(14, 14, dtype=torch.bool)
        inside[top // 4 : top // 4 + 4, left // 4 : left // 4 + 4] = True
        assert scores[inside].mean() > 3 * scores[~inside].mean()


@pytest.mark.parametrize("band", [(0.0, 8.0), (2.0, 5.0), (3.0, math.inf)])
@pytest.mark.parametrize("size", [(56, 56), (40, 66)])
def test_cell_means_of_a_band_equal_the_means_of_the_filtered_image(band, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.adaptive_avg_pool2d(_gaussian_band(images, *band), 14)
    torch.testing.assert_close(_band_cells(images, *band, 14), expected, atol=1e-5, rtol=1e-4)


def test_spectral_residual_equals_the_paper_in_numpy():
    grey = np.random.default_rng(0).random((64, 64))
    spectrum = np.fft.fft2(grey)
    log_amplitude = np.log(np.abs(spectrum))
    residual = log_amplitude - scipy.ndimage.uniform_filter(log_amplitude, 3, mode="wrap")
    saliency = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    cells = saliency.reshape(8, 8, 8, 8).mean((1, 3))
    cells = scipy.ndimage.uniform_filter(cells, 3, mode="nearest")
    image = torch.from_numpy(grey).float().expand(1, 3, 64, 64)
    scores = pixel_frequency(image, 8, "spectral_residual")[0]
    np.testing.assert_allclose(scores.numpy(), cells / cells.mean(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["lowpass", "border_geodesic"])
def test_a_score_is_the_same_at_any_resolution(kind):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(4, 3, 7, 7, generator=generator)
    full = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic").clamp(0, 1)
    half = torch.nn.functional.avg_pool2d(full, 4)
    a, b = (pixel_frequency(images, 14, kind).flatten() for images in (full, half))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.99


def test_lab_of_the_primaries():
    # Published values of the sRGB primaries and white under D65, two decimals.
    rgb = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    lab = rgb_to_lab(rgb.T[None, :, None, :])[0, :, 0].T
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86],
                [100.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # fmt: skip
    np.testing.assert_allclose(lab.numpy(), expected, atol=0.03)


def test_token_frequency_equals_a_slow_loop():
    tokens = np.random.default_rng(0).normal(size=(1, 9, 3))
    count = 9
    middle, width = (count - 1) / 2, (0.15 * count / 2) ** 2
    score = np.zeros(count)
    for channel in range(3):
        x = tokens[0, :, channel]
        spectrum = [
            sum(x[n] * np.exp(-2j * np.pi * j * n / count) for n in range(count))
            * (1 - np.exp(-((j - middle) ** 2) / (2 * width)))
            for j in range(count)
        ]
        for n in range(count):
            y = sum(spectrum[j] * np.exp(2j * np.pi * j * n / count) for j in range(count)) / count
            score[n] += abs(y)
    expected = score / np.abs(tokens[0]).sum(1).mean()
    actual = token_frequency(torch.from_numpy(tokens))[0]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5)


def test_token_frequency_of_zeros_is_zero():
    assert (token_frequency(torch.zeros(1, 16, 4)) == 0).all()


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (torch.zeros(3, 8, 8), {}, r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, "float"),
        (torch.full((1, 3, 8, 8), math.nan), {}, "NaN"),
        (torch.zeros(1, 3, 8, 8), {"kind": "wavelet"}, "wavelet.*lowpass"),
        (torch.zeros(1, 3, 8, 8), {"kind": "lowpass", "band": (5.0, 2.0)}, "low < high"),
        (torch.zeros(1, 3, 8, 8), {"kind": "lowpass", "band": (0.0, 1e-200)}, "0 and 0.01"),
        (torch.zeros(1, 3, 8, 8), {"band": (0.0, 2.0)}, "no band"),
        (torch.zeros(1, 3, 8, 8), {"kind": "spectral_residual", "band": (0.0, 2.0)}, "no band"),
        (torch.zeros(1, 3, 8, 8), {"grid": 1}, "at least 2"),
    ],
)
def test_bad_input_is_refused_by_name(images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pixel_frequency(images, **{"grid": 4, "kind": DEFAULT_KIND, **kwargs})
