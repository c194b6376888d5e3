import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from famt.mask_units import split_of_patches, unit_weights
from famt.sampling import sample_patches


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_a_unit_weighs_the_mean_of_its_patches(side, unit, seed):
    grid = side * unit
    weights = torch.rand(2, grid**2, generator=torch.Generator().manual_seed(seed))
    found = unit_weights(weights, unit)
    for n in range(side**2):
        top, left = n // side * unit, n % side * unit
        inside = [y * grid + x for y in range(top, top + unit) for x in range(left, left + unit)]
        expected = sum(weights[:, patch] for patch in inside) / len(inside)
        torch.testing.assert_close(found[:, n], expected)


@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 99))
def test_a_split_of_units_becomes_a_partition_into_whole_units(side, unit, seed):
    grid = side * unit
    generator = torch.Generator().manual_seed(seed)
    units = sample_patches(torch.rand(2, side**2, generator=generator), 0.44, 0.26, generator)
    split = split_of_patches(units, unit)
    together = torch.cat([split.masked, split.thrown, split.visible], 1)
    assert (together.sort(1).values == torch.arange(grid**2)).all()
    for name in ("masked", "thrown", "visible", "predicted"):
        for of_units, of_patches in zip(
            getattr(units, name).tolist(), getattr(split, name).tolist(), strict=True
        ):
            home = [(n // grid // unit) * side + n % grid // unit for n in of_patches]
            assert home == [n for n in of_units for _ in range(unit**2)]


@pytest.mark.parametrize(("image_size", "masked", "thrown"), [(224, 84, 52), (32, 28, 16)])
def test_the_published_ratios_in_patches(image_size, masked, thrown):
    """Of 7 x 7 units of 32 px, 21 are masked and 13 thrown; of CIFAR's 4 x 4, 7 and 4."""
    side = {224: 7, 32: 4}[image_size]
    split = split_of_patches(sample_patches(torch.ones(1, side**2), 0.44, 0.26), 2)
    assert (split.masked.shape[1], split.thrown.shape[1]) == (masked, thrown)
