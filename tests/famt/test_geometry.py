import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.geometry import crop_labels, crop_maps, overlap, paste_maps

windows = st.tuples(
    st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.02, 1), st.floats(0.02, 1)
).map(lambda w: (w[0], w[1], w[2] * (1 - w[0]), w[3] * (1 - w[1])))


def _crop(maps, window, flip, grid):
    return crop_maps(maps, torch.tensor([window], dtype=maps.dtype), torch.tensor([flip]), grid)


def _supersampled(scores, window, flip, grid, samples=60):
    """Look the map up at many points of every output cell, and average."""
    top, left, height, width = window
    side = len(scores)
    result = torch.zeros(grid, grid, dtype=scores.dtype)
    points = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    for i in range(grid):
        for j in range(grid):
            y = ((top + (i + points) / grid * height) * side).long().clamp(0, side - 1)
            x = ((left + (j + points) / grid * width) * side).long().clamp(0, side - 1)
            result[i, grid - 1 - j if flip else j] = scores[y][:, x].mean()
    return result


@settings(max_examples=40)
@given(windows, st.booleans(), st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_a_crop_equals_a_brute_force_area_mean(window, flip, grid, side, seed):
    maps = torch.rand(1, side, side, dtype=torch.float64,
                      generator=torch.Generator().manual_seed(seed))  # fmt: skip
    expected = _supersampled(maps[0], window, flip, grid)
    torch.testing.assert_close(_crop(maps, window, flip, grid)[0], expected, atol=0.04, rtol=0)


@given(st.integers(1, 20), st.integers(0, 99))
def test_the_full_window_is_the_identity(side, seed):
    maps = torch.rand(1, side, side, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(_crop(maps, (0.0, 0.0, 1.0, 1.0), False, side), maps)


@given(windows, st.booleans(), st.integers(1, 16))
def test_a_crop_is_linear_in_the_map(window, flip, grid):
    a, b = torch.rand(2, 1, 14, 14, dtype=torch.float64)
    combined = _crop(2 * a - 3 * b, window, flip, grid)
    separate = 2 * _crop(a, window, flip, grid) - 3 * _crop(b, window, flip, grid)
    torch.testing.assert_close(combined, separate)


@given(windows, st.integers(1, 16))
def test_a_flip_reverses_columns_and_twice_is_none(window, grid):
    maps = torch.rand(1, 14, 14)
    flipped = _crop(maps, window, True, grid)
    torch.testing.assert_close(flipped.flip(-1), _crop(maps, window, False, grid))


@given(st.integers(1, 20), st.integers(1, 20))
def test_the_full_window_keeps_the_mean_at_any_grid(side, grid):
    maps = torch.rand(1, side, side, dtype=torch.float64)
    torch.testing.assert_close(_crop(maps, (0.0, 0.0, 1.0, 1.0), False, grid).mean(), maps.mean())


@given(st.floats(0, 0.99), st.floats(0.005, 1), st.integers(1, 20), st.integers(1, 20))
def test_rows_of_the_overlap_sum_to_one(start, length, cells, map_cells):
    length = min(length, 1 - start)
    shares = overlap(torch.tensor([start]), torch.tensor([length]), cells, map_cells)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, cells))


def test_views_of_a_batch_do_not_mix():
    maps = torch.rand(3, 14, 14)
    cut = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.1, 0.5, 0.6], [0.5, 0.5, 0.25, 0.5]])
    flips = torch.tensor([True, False, True])
    together = crop_maps(maps, cut, flips, 8)
    for n in range(3):
        alone = crop_maps(maps[n : n + 1], cut[n : n + 1], flips[n : n + 1], 8)
        torch.testing.assert_close(together[n : n + 1], alone)


def test_half_precision_maps_are_cropped_in_float32():
    assert _crop(torch.rand(1, 4, 4).half(), (0.0, 0.0, 1.0, 1.0), False, 4).dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"windows \[B, 4\]"):
        crop_maps(torch.rand(2, 4, 4), torch.rand(1, 4), torch.zeros(2, dtype=torch.bool), 4)


def _paste(maps, crops, window, flip):
    return paste_maps(maps, crops, torch.tensor([window], dtype=maps.dtype), torch.tensor([flip]))


def _pasted_by_points(old, crop, window, flip, samples=60):
    """Look at many points of every cell: those in the window show the crop, the others the map."""
    top, left, height, width = window
    side, grid = len(old), len(crop)
    shown = crop.flip(1) if flip else crop
    result = torch.zeros_like(old)
    points = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    for i in range(side):
        for j in range(side):
            y, x = torch.meshgrid((i + points) / side, (j + points) / side, indexing="ij")
            v, u = (y - top) / height, (x - left) / width
            inside = (v >= 0) & (v < 1) & (u >= 0) & (u < 1)
            seen = shown[(v * grid).long().clamp(0, grid - 1), (u * grid).long().clamp(0, grid - 1)]
            result[i, j] = torch.where(inside, seen, old[i, j]).mean()
    return result


@settings(max_examples=40)
@given(windows, st.booleans(), st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_a_pasted_crop_equals_a_look_at_many_points(window, flip, grid, side, seed):
    generator = torch.Generator().manual_seed(seed)
    old = torch.rand(1, side, side, dtype=torch.float64, generator=generator)
    crop = torch.rand(1, grid, grid, dtype=torch.float64, generator=generator)
    expected = _pasted_by_points(old[0], crop[0], window, flip)
    torch.testing.assert_close(_paste(old, crop, window, flip)[0], expected, atol=0.07, rtol=0)


@given(windows, st.booleans(), st.integers(1, 16))
def test_pasting_what_a_view_shows_keeps_the_mean_of_the_image(window, flip, grid):
    maps = torch.rand(1, 14, 14, dtype=torch.float64)
    pasted = _paste(maps, _crop(maps, window, flip, grid), window, flip)
    torch.testing.assert_close(pasted.mean(), maps.mean())


@given(windows, st.booleans())
def test_pasting_a_constant_into_itself_changes_nothing(window, flip):
    maps = torch.full((1, 14, 14), 0.7)
    torch.testing.assert_close(_paste(maps, torch.full((1, 5, 5), 0.7), window, flip), maps)


def test_a_full_flipped_crop_replaces_the_map_by_its_mirror_image():
    crop = torch.rand(1, 14, 14)
    torch.testing.assert_close(
        _paste(torch.zeros(1, 14, 14), crop, (0.0, 0.0, 1.0, 1.0), True), crop.flip(-1)
    )


def test_pasting_shapes_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected maps"):
        paste_maps(torch.ones(2, 7, 7), torch.ones(1, 7, 7), torch.ones(2, 4), torch.ones(2).bool())


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
