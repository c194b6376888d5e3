import numpy as np
import pytest
import torch
from PIL import Image
from samples import encode, photo_members, score, tar_bytes, write_tar

from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import CentreView, LoaderConfig, RandomView, WholeView
from famt.pipeline.sharding.segmentation_masks import crop_masks, decode_mask, read_masks

SIDE, CELL = 120, 8  # px


def _places(height, width):
    """An image whose red and green tell row and column, and a mask that numbers its cells."""
    row, column = np.mgrid[:height, :width]
    image = np.stack([row * 2, column * 2, np.full_like(row, 90)], axis=-1).astype(np.uint8)
    return image, (row // CELL * (SIDE // CELL) + column // CELL).astype(np.uint8)


def _table(scored, tmp_path, members):
    path = write_tar(tmp_path / "masked.tar", members)
    score([path], scored.cache, scored.spec)
    return load_samples([str(path)], scored.cache)


@pytest.mark.parametrize("view", [RandomView(), RandomView(flip=1.0), CentreView(0.6), WholeView()])
@pytest.mark.parametrize("larger", [1, 2])
def test_masks_and_crops_agree_where_every_pixel_tells_its_place(scored, tmp_path, view, larger):
    members = []
    for n, (height, width) in enumerate([(120, 120), (88, 120), (120, 64)] * 4):
        image, mask = _places(height, width)
        mask = mask.repeat(larger, 0).repeat(larger, 1)  # a mask may be finer than its image
        members += [(f"{n:02d}.png", encode(image, "PNG")), (f"{n:02d}.mask.png",
                    encode(mask, "PNG"))]  # fmt: skip
    table = _table(scored, tmp_path, members)
    masks = read_masks(table)
    config = LoaderConfig(batch_size=4, image_size=32, view=view, shuffle_buffer=8, threads=1)
    seen = 0
    for crops in CropLoader(table, config, drop_last=False):
        cut = crop_masks([masks[row] for row in crops.rows], crops.windows, crops.flips, 32)
        place = crops.images[..., :2].float() / 2  # row and column in the whole image, px
        cell = (place / CELL).floor()
        expected = (cell[..., 0] * (SIDE // CELL) + cell[..., 1]).long()
        # Resized colours are right to a pixel: near the edge of a cell they can't tell.
        inside = (place % CELL > 1.5).all(-1) & (place % CELL < CELL - 1.5).all(-1)
        middle = torch.zeros(32, 32, dtype=torch.bool)
        middle[2:-2, 2:-2] = True  # where resizing does not reach beyond the crop
        compared = inside & middle
        assert compared.sum() > 300
        assert torch.equal(cut[compared], expected[compared])
        seen += len(crops.rows)
    assert seen == 12


def test_masks_follow_the_rows_of_several_shards(scored, tmp_path):
    paths = []
    for shard, count in enumerate((3, 2)):
        members = []
        for n in range(count):
            name, data = photo_members(1, 10 * shard + n)[0]
            mask = np.full((5, 6), 10 * shard + n, np.uint8)
            members += [(name.replace(".jpg", ".mask.png"), encode(mask, "PNG")), (name, data)]
        members.insert(0, ("broken.jpg", b"no image"))
        paths.append(tmp_path / f"m{shard}.tar")
        paths[-1].write_bytes(tar_bytes(members))
    score(paths, scored.cache, scored.spec)
    masks = read_masks(load_samples([str(path) for path in paths], scored.cache))
    assert [int(decode_mask(png)[0, 0]) for png in masks] == [0, 1, 2, 10, 11]


def test_a_sample_without_a_mask_is_named(scored, tmp_path):
    table = _table(scored, tmp_path, photo_members(2))
    with pytest.raises(UserError, match=r"masked\.tar:img0000 has no mask"):
        read_masks(table)


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_class_numbers_are_read_from_every_kind_of_mask(mode):
    labels = np.array([[0, 1, 255], [7, 3, 2]], np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([(7 * n) % 256 for n in range(768)])
    assert decode_mask(encode(image, "PNG")).tolist() == labels.tolist()


def test_black_and_white_is_a_mask_of_two_classes():
    labels = np.array([[True, False], [False, True]])
    assert decode_mask(encode(Image.fromarray(labels), "PNG")).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"none", "can't be decoded"), (encode(np.zeros((4, 4, 3), np.uint8), "PNG"), "RGB colours")],
)
def test_what_is_no_mask_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        decode_mask(data)
