import pytest
import torch
import torchvision.transforms.functional as tvf
from hypothesis import given
from hypothesis import strategies as st

from famt.patches import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    gather_patches,
    normalise,
    normalise_images,
    patchify,
    unpatchify,
)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_patchify_equals_slicing(patch, down, across, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, down * patch, across * patch, 3), generator=generator)
    patches = patchify(images, patch)
    for n in range(down * across):
        y, x = n // across * patch, n % across * patch
        cut = images[:, y : y + patch, x : x + patch]
        assert torch.equal(patches[:, n], cut.reshape(2, -1))


def test_unpatchify_undoes_patchify():
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)


@pytest.mark.parametrize("contiguous", [True, False])
def test_gathering_copies_just_those_patches(contiguous):
    images = torch.randint(0, 256, (3, 24, 16, 3), dtype=torch.uint8)
    if not contiguous:
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    index = torch.tensor([[5, 0], [1, 1], [3, 4]])
    expected = torch.stack([patchify(images, 8)[b, index[b]] for b in range(3)])
    assert torch.equal(gather_patches(images, index, 8), expected)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="30 x 32 px"):
        patchify(torch.zeros(1, 30, 32, 3), 16)


def test_normalisation_is_torchvisions():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    expected = tvf.normalize(images.permute(0, 3, 1, 2) / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(normalise_images(images), expected)
    patches = unpatchify(normalise(patchify(images, 4)), 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(patches, expected)
