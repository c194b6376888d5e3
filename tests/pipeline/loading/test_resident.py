import dataclasses

import pytest
import torch

from famt.pipeline.errors import UserError
from famt.pipeline.loading import resident
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.loading.resident import ResidentLoader
from famt.pipeline.options import DecodeConfig, LoaderConfig

CONFIG = LoaderConfig(
    batch_size=8, image_size=48, shuffle_buffer=16, threads=1, decode=DecodeConfig(on="gpu")
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def resident_loader(table, config=CONFIG, **options):
    return ResidentLoader(
        table, dataclasses.replace(config, resident=True), drop_last=True, **options
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("crops", [1, 2])
def test_views_are_those_of_the_other_loader_and_pixels_close_to_its(table, crops, device):
    config = dataclasses.replace(CONFIG, crops_per_image=crops)
    decoding = CropLoader(table, config, drop_last=True, device=device, seed=5)
    holding = resident_loader(table, config, device=device, seed=5)
    for decoded, held in zip(decoding, holding, strict=True):
        for name in ("rows", "windows", "flips"):
            assert torch.equal(getattr(decoded, name), getattr(held, name))
        assert held.images.shape == decoded.images.shape
        apart = (decoded.images.float() - held.images.float()).abs().mean((1, 2, 3))
        # A filter on the whole image sees what lies beyond a crop's rim, this one does not.
        assert apart.max() < (1.0 if crops == 1 and device == "cpu" else 6.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_its_share_alone(table, rank):
    held = resident_loader(table, rank=rank, world_size=2)
    seen = {row for batch in held for row in batch.rows.tolist()}
    assert seen <= set(held.rows)
    assert len(held._images) == len(held.rows) == 13


def test_images_that_memory_has_no_room_for_are_refused_with_the_remedy(table, monkeypatch):
    monkeypatch.setattr(resident, "_ROOM", 1e-9)
    with pytest.raises(UserError, match=r"--resident: 26 images .* leave it out"):
        resident_loader(table)
