import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.geometry import crop_labels, crop_maps, paste_maps

windows = st.tuples(
    st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.02, 1), st.floats(0.02, 1)
).map(lambda w: (w[0], w[1], w[2] * (1 - w[0]), w[3] * (1 - w[1])))
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def _shared(window, flip, grid, side):
    """For each cell of a view and each of a map (row, column, row, column): the area they share,
    in cells of the map."""
    top, left, height, width = window
    areas = {}
    for i in range(grid):
        for j in range(grid):
            y, x = top + i * height / grid, left + (grid - 1 - j if flip else j) * width / grid
            for row in range(side):
                for column in range(side):
                    low = min(y + height / grid, (row + 1) / side) - max(y, row / side)
                    wide = min(x + width / grid, (column + 1) / side) - max(x, column / side)
                    areas[i, j, row, column] = max(low, 0.0) * max(wide, 0.0) * side**2
    return areas


def _batch(several):
    cuts, flips = zip(*several, strict=True)
    return torch.tensor(cuts, dtype=torch.float64), torch.tensor(flips)


views = st.lists(st.tuples(windows, st.booleans()), min_size=1, max_size=3)


@settings(max_examples=40)
@given(views, st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_a_crop_has_the_mean_of_the_map_over_the_area_of_each_cell(several, grid, side, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(len(several), side, side, dtype=torch.float64, generator=generator)
    expected = torch.zeros(len(several), grid, grid, dtype=torch.float64)
    for n, view in enumerate(several):
        whole = torch.zeros(grid, grid, dtype=torch.float64)
        for (i, j, row, column), area in _shared(*view, grid, side).items():
            expected[n, i, j] += area * maps[n, row, column]
            whole[i, j] += area
        expected[n] /= whole
    torch.testing.assert_close(crop_maps(maps, *_batch(several), grid), expected)


@settings(max_examples=40)
@given(views, st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_a_pasted_crop_replaces_the_map_by_the_area_that_it_covers(several, grid, side, seed):
    generator = torch.Generator().manual_seed(seed)
    old = torch.rand(len(several), side, side, dtype=torch.float64, generator=generator)
    crops = torch.rand(len(several), grid, grid, dtype=torch.float64, generator=generator)
    expected = old.clone()
    for n, view in enumerate(several):
        for (i, j, row, column), area in _shared(*view, grid, side).items():
            expected[n, row, column] += area * (crops[n, i, j] - old[n, row, column])
    torch.testing.assert_close(paste_maps(old, crops, *_batch(several)), expected)


@given(st.integers(1, 20), st.integers(0, 99))
def test_the_full_window_is_the_identity(side, seed):
    maps = torch.rand(1, side, side, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(crop_maps(maps, WHOLE, torch.tensor([False]), side), maps)


def test_half_precision_maps_are_cropped_in_float32():
    maps = torch.rand(1, 4, 4).half()
    assert crop_maps(maps, WHOLE, torch.tensor([False]), 4).dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    maps, flips = torch.rand(2, 4, 4), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"windows \[B, 4\] .* got \[2, 4, 4\], \[1, 4\], \[2\]"):
        crop_maps(maps, WHOLE, flips, 4)
    with pytest.raises(ValueError, match="expected maps"):
        paste_maps(maps, maps[:1], WHOLE.expand(2, 4), flips)


def test_labels_of_the_full_window_are_the_mask_itself():
    labels = torch.arange(49).view(7, 7)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(crop_labels(labels, whole, False, 7), labels)
    assert torch.equal(crop_labels(labels, whole, True, 7), labels.flip(1))


def test_labels_are_those_under_the_centres_of_a_crops_pixels():
    labels = torch.randint(0, 99, (23, 31), generator=torch.Generator().manual_seed(0))
    top, left, height, width = 0.2, 0.37, 0.5, 0.6
    found = crop_labels(labels, torch.tensor([top, left, height, width]), True, 9)
    for i in range(9):
        for j in range(9):
            y = int((top + height * (i + 0.5) / 9) * 23)
            x = int((left + width * (8 - j + 0.5) / 9) * 31)
            assert found[i, j] == labels[y, x]
