import dataclasses

import pytest
import torch

from famt.mae import MaskedAutoencoder
from famt.models import MODELS, ModelConfig


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3),
     ("vit_huge", 630.8)],
)  # fmt: skip
def test_names_have_the_sizes_of_their_namesakes(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in MODELS[name].encoder().parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_size": 30, "patch_size": 8},
            "image_size 30 must be a multiple of the patch size, 8",
        ),
        ({"patch_size": 0}, "patch_size 0 must be at least 1"),
        ({"decoder": "croos"}, "decoder 'croos' must be self or cross"),
        ({"heads": 5}, "width 96 must be a multiple of its 5 heads"),
        ({"decoder_width": 66}, "decoder_width 66 must be .* of 4 for"),
    ],
)
def test_sizes_that_make_no_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODELS["vit_nano"], **change)


def test_sizes_are_read_off_an_encoder():
    for name in ("vit_nano", "vit_tiny"):
        sizes = ModelConfig.of(MODELS[name].encoder())
        for each in ("width", "depth", "heads", "image_size", "patch_size"):
            assert getattr(sizes, each) == getattr(MODELS[name], each), (name, each)


def test_no_weight_of_a_new_encoder_is_what_the_memory_held():
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, where it is asked for
    torch.use_deterministic_algorithms(True)
    try:
        weights = MODELS["vit_nano"].encoder().state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, each in weights.items() if not each.isfinite().all()] == []


def test_positions_are_maes_and_not_trained():
    model = MaskedAutoencoder(dataclasses.replace(MODELS["vit_nano"], image_size=64))
    for positions, width in ((model.encoder.pos_embed, 96), (model.decoder_pos_embed, 64)):
        assert positions.shape == (1, 1 + 16 * 16, width)
        assert not positions.requires_grad
        assert (positions[:, 0] == 0).all()
        first = positions[0, 1]  # at (0, 0) every sine is 0 and every cosine 1
        assert sorted(first.tolist()) == [0.0] * (width // 2) + [1.0] * (width // 2)
