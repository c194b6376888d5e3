import pytest
import torch

from famt.patches import patchify
from pipeline.join import JoinConfig, join_weights, split_crops
from pipeline.loader import CropLoader, LoaderConfig
from pipeline.table import load_maps, load_samples

GRID, PATCH = 7, 8
PLAIN = JoinConfig(frequency_exponent=1.0)


@pytest.fixture
def maps(scored):
    return load_maps(load_samples(scored.shards, scored.cache), scored.cache, scored.spec)


@pytest.fixture
def crops(scored):
    table = load_samples(scored.shards, scored.cache)
    config = LoaderConfig(batch_size=8, image_size=GRID * PATCH, shuffle_buffer=16, threads=1)
    return next(iter(CropLoader(table, config, drop_last=True)))


def test_weights_are_the_area_means_of_each_crops_own_map(crops, maps):
    weights = join_weights(crops, maps, GRID, PLAIN)
    side = 420
    for n, row in enumerate(crops.rows.tolist()):
        top, left, height, width = crops.windows[n].tolist()
        y = ((top + (torch.arange(side) + 0.5) / side * height) * GRID).long()
        x = ((left + (torch.arange(side) + 0.5) / side * width) * GRID).long()
        dense = maps[row].float()[y][:, x]
        expected = dense.view(GRID, side // GRID, GRID, -1).mean((1, 3))
        expected = expected.flip(1) if crops.flips[n] else expected
        expected = expected.flatten() / expected.mean()
        torch.testing.assert_close(weights[n], expected, atol=0.03, rtol=0.03)


def test_attention_multiplies_and_exponents_apply(crops, maps):
    attention = torch.rand(8, GRID**2)
    both = join_weights(crops, maps, GRID, PLAIN, attention)
    alone = join_weights(crops, maps, GRID, PLAIN)
    relative = attention / attention.mean(1, keepdim=True)
    torch.testing.assert_close(both, alone * relative)
    only = join_weights(crops, maps, GRID, JoinConfig(frequency_exponent=0.0), attention)
    torch.testing.assert_close(only, relative)
    root = join_weights(crops, maps, GRID, JoinConfig(frequency_exponent=0.5))
    torch.testing.assert_close(root, alone.sqrt())


def test_without_any_signal_weights_are_uniform(crops):
    assert (join_weights(crops, None, GRID, PLAIN) == 1).all()


def test_a_batch_leaves_with_the_pixels_of_its_split(crops, maps):
    weights = join_weights(crops, maps, GRID, PLAIN)
    batch = split_crops(crops, weights, PATCH, JoinConfig(0.5, 0.25))
    patches = patchify(crops.images, PATCH)
    for pixels, index in ((batch.visible, batch.split.visible), (batch.masked, batch.split.masked)):
        expected = torch.stack([patches[b, index[b]] for b in range(8)])
        assert torch.equal(pixels, expected)
    assert batch.visible.dtype == torch.uint8


def test_heavy_patches_are_masked_and_light_ones_seen(crops, maps):
    weights = join_weights(crops, maps, GRID, PLAIN)
    generator = torch.Generator().manual_seed(0)
    masked = visible = 0.0
    for _ in range(50):
        split = split_crops(crops, weights, PATCH, PLAIN, generator).split
        masked += weights.gather(1, split.masked).mean()
        visible += weights.gather(1, split.visible).mean()
    assert masked > 1.2 * visible
