import dataclasses

import pytest
import torch

from famt.models import ModelConfig
from famt.patches import gather_patches, normalise, patchify
from famt.pipeline.loading.dataset import load_maps
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.loading.masking import crop_scores, split_crops
from famt.pipeline.options import JoinConfig, LoaderConfig
from famt.targets import low_pass

GRID, PATCH = 7, 8
SIZES = ModelConfig(width=24, depth=2, heads=3, image_size=GRID * PATCH, patch_size=PATCH)


@pytest.fixture
def crops(table):
    config = LoaderConfig(batch_size=8, image_size=GRID * PATCH, shuffle_buffer=16, threads=1)
    return next(iter(CropLoader(table, config, drop_last=True)))


@pytest.fixture
def weights(scored, table, crops):
    return crop_scores(load_maps(table, scored.cache, scored.spec), crops, GRID)


def test_scores_are_the_area_means_of_each_crops_own_map(scored, table, crops, weights):
    maps = load_maps(table, scored.cache, scored.spec)
    side = 420
    for n, row in enumerate(crops.rows.tolist()):
        top, left, height, width = crops.windows[n].tolist()
        y = ((top + (torch.arange(side) + 0.5) / side * height) * GRID).long()
        x = ((left + (torch.arange(side) + 0.5) / side * width) * GRID).long()
        dense = maps[row].float()[y][:, x]
        expected = dense.view(GRID, side // GRID, GRID, -1).mean((1, 3))
        expected = expected.flip(1) if crops.flips[n] else expected
        torch.testing.assert_close(weights[n], expected.flatten(), atol=0.03, rtol=0.03)


def test_heavy_patches_are_masked_and_light_ones_seen(crops, weights):
    generator = torch.Generator().manual_seed(0)
    masked = visible = 0.0
    for _ in range(50):
        split = split_crops(crops, weights, SIZES, JoinConfig(), generator).split
        masked += weights.gather(1, split.masked).mean()
        visible += weights.gather(1, split.visible).mean()
    assert masked > 1.2 * visible


def test_pixels_are_gathered_and_weighed_for_predicted_patches_alone(crops, weights):
    config = JoinConfig(predicted_share=0.5, predicted="spread", loss_exponent=1.0)
    batch = split_crops(crops, weights, SIZES, config, torch.Generator().manual_seed(0))
    patches = patchify(crops.images, PATCH)
    assert batch.split.masked.shape[1] == 22
    assert batch.masked.shape[1] == batch.loss_weights.shape[1] == 11
    for b in range(8):
        index = batch.split.predicted[b]
        assert torch.equal(batch.masked[b], patches[b, index])
        expected = weights[b, index] / weights[b, batch.split.masked[b]].mean()
        torch.testing.assert_close(batch.loss_weights[b], expected)


def test_a_batch_is_cut_into_equal_parts(crops, weights):
    config = JoinConfig(predicted_share=0.5, loss_exponent=1.0)
    whole = split_crops(crops, weights, SIZES, config)
    parts = whole.chunk(4)
    assert torch.cat([part.views.rows for part in parts]).equal(whole.views.rows)
    for name in ("visible", "masked", "loss_weights"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for name, value in vars(whole.split).items():
        assert torch.equal(torch.cat([getattr(part.split, name) for part in parts]), value)


def test_weights_count_more_as_the_run_goes_on(crops):
    weights = torch.zeros(8, GRID**2)
    weights[:, :22] = 1.0
    config, shares = JoinConfig(blend=(0.0, 1.0)), []
    for progress in (0.0, 0.5, 1.0, 7.0):
        generator = torch.Generator().manual_seed(0)
        split = split_crops(crops, weights, SIZES, config, generator, progress).split
        shares.append(weights.gather(1, split.masked).mean().item())
    assert shares[0] == pytest.approx(22 / 49, abs=0.1)
    assert shares[0] < shares[1] < shares[2] == shares[3] == 1.0
    assert [config.blend_at(each) for each in (-1.0, 0.25, 1.0, 2.0)] == [0.0, 0.25, 1.0, 1.0]


def test_units_are_masked_whole_by_their_mean_weight(crops):
    sizes = dataclasses.replace(SIZES, patch_size=4, unit=2)  # 14 x 14 patches, 7 x 7 units
    heavy = torch.zeros(8, 7, 7)
    heavy[:, 2, 3] = 1.0
    weights = heavy.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    batch = split_crops(crops, weights, sizes, JoinConfig(0.03, 0.5))
    expected = sorted([4 * 14 + 6, 4 * 14 + 7, 5 * 14 + 6, 5 * 14 + 7])
    assert all(sorted(row) == expected for row in batch.split.masked.tolist())
    assert torch.equal(batch.masked, gather_patches(crops.images, batch.split.masked, 4))


def test_low_passed_pixels_are_predicted_and_whole_ones_seen(crops, weights):
    sizes = dataclasses.replace(SIZES, low_pass=6.0)
    batch, plain = (
        split_crops(crops, weights, each, JoinConfig(), torch.Generator().manual_seed(0))
        for each in (sizes, SIZES)
    )
    smooth = patchify(low_pass(crops.images, 6.0), PATCH)
    for b in range(8):
        assert torch.equal(batch.masked[b], smooth[b, batch.split.masked[b]])
    assert torch.equal(batch.visible, plain.visible)
    before = batch.masked.clone()
    assert normalise(batch.masked).isfinite().all()
    assert torch.equal(batch.masked, before)
