"""Low-passed targets against the discrete Fourier sum, term by term."""

import cmath

import pytest
import torch

from famt.targets import low_pass


@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
@pytest.mark.parametrize("radius", [0.0, 1.0, 2.5, 10.0])
def test_a_low_pass_is_the_fourier_sum_over_a_circle(size, radius):
    height, width = size
    image = torch.randint(0, 256, (1, height, width, 2), dtype=torch.uint8)
    found = low_pass(image, radius)
    for channel in range(2):
        expected = torch.zeros(height, width, dtype=torch.complex128)
        for v in range(-(height // 2), (height + 1) // 2):
            for u in range(-(width // 2), (width + 1) // 2):
                if v * v + u * u > radius * radius:
                    continue
                wave = torch.tensor(
                    [
                        [cmath.exp(2j * cmath.pi * (v * y / height + u * x / width))
                         for x in range(width)]
                        for y in range(height)
                    ],
                    dtype=torch.complex128,
                )  # fmt: skip
                share = (image[0, :, :, channel].to(torch.complex128) * wave.conj()).sum()
                expected += share * wave / (height * width)
        torch.testing.assert_close(
            found[0, :, :, channel], expected.real.float(), atol=1e-4, rtol=0
        )
