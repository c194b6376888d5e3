import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from famt.resample import resample

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def whole(count):
    return torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(count, 1)


@pytest.mark.parametrize("interpolation", PILLOW)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 24), data=st.data())
def test_a_crop_is_what_pillow_makes_of_it(interpolation, seed, size, data):
    rng = np.random.default_rng(seed)
    height, width = (data.draw(st.integers(4, 40)) for _ in range(2))
    high, wide = (data.draw(st.integers(2, side)) for side in (height, width))
    top, left = data.draw(st.integers(0, height - high)), data.draw(st.integers(0, width - wide))
    flip = data.draw(st.booleans())
    # Pillow cuts what overshoots after its first pass too; these values leave room.
    image = rng.integers(70, 180, (height, width, 3), dtype=np.uint8)
    crop = Image.fromarray(image).crop((left, top, left + wide, top + high))
    expected = np.asarray(crop.resize((size, size), PILLOW[interpolation]))
    if flip:
        expected = expected[:, ::-1]
    padded = np.full((1, 3, height + 3, width + 5), 255, np.uint8)  # what lies beyond is not read
    padded[0, :, :height, :width] = image.transpose(2, 0, 1)
    found = resample(
        torch.from_numpy(padded),
        torch.tensor([[height, width]]),
        torch.tensor([[top / height, left / width, high / height, wide / width]]),
        torch.tensor([flip]),
        size,
        interpolation,
    )
    # Pillow rounds to bytes between its two passes, and its weights to 22 bits.
    assert np.abs(found[0].numpy().astype(int) - expected.astype(int)).max() <= 1


def test_the_whole_image_at_its_size_is_left_as_it_is():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    extents, none = torch.full((3, 2), 16), torch.zeros(3, dtype=torch.bool)
    found = resample(images, extents, whole(3), none, 16)
    assert torch.equal(found.permute(0, 3, 1, 2), images)
