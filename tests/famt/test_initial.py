"""Other people's weights in our encoders: what fits is taken, what does not is named."""

import dataclasses
import math

import pytest
import torch
from samples import TINY
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from famt.export import official_state
from famt.initial import EncoderSizes, encoder_sizes, load_encoder_weights, load_weights
from famt.mae import MaskedAutoencoder
from famt.simmim import SimMIM


@pytest.fixture
def model():
    """A model none of whose weights are what a fresh one has."""
    torch.manual_seed(1)
    model = MaskedAutoencoder(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def _fresh(**sizes):
    return MaskedAutoencoder(dataclasses.replace(TINY, **sizes))


def _same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_weights_of_the_same_sizes_are_taken_bit_for_bit(model):
    target = _fresh()
    fit = load_weights(target, official_state(model))
    assert _same(target, model)
    assert set(fit.taken) == set(official_state(model))
    assert not fit.resized
    assert not fit.missing
    assert not fit.left_out
    assert fit.describe() == f"  taken     {len(fit.taken)} tensors"


def test_half_precision_is_widened_without_loss(model):
    half = {name: value.bfloat16() for name, value in official_state(model).items()}
    target = _fresh()
    load_weights(target, half)
    assert all(torch.equal(half[name].float(), v) for name, v in official_state(target).items())


def test_positions_are_interpolated_to_another_image_size_as_timm_does(model):
    target = _fresh(image_size=48)
    fit = load_weights(target, official_state(model))
    assert torch.equal(
        target.encoder.pos_embed, resample_abs_pos_embed(model.encoder.pos_embed, [6, 6], [4, 4])
    )
    assert torch.equal(
        target.decoder_pos_embed, resample_abs_pos_embed(model.decoder_pos_embed, [6, 6], [4, 4])
    )
    assert fit.resized == dict.fromkeys(
        ("pos_embed", "decoder_pos_embed"), "4 x 4 patches to 6 x 6"
    )
    assert "resized   pos_embed (4 x 4 patches to 6 x 6)" in fit.describe()


def test_the_patch_projection_is_resampled_to_another_patch_size_as_timm_does(model):
    target = _fresh(patch_size=4, image_size=16)
    fit = load_encoder_weights(target.encoder, model.encoder.state_dict())
    expected = resample_patch_embed(model.encoder.patch_embed.proj.weight, [4, 4])
    assert torch.equal(target.encoder.patch_embed.proj.weight, expected)
    assert fit.resized == {"patch_embed.proj.weight": "patches of 8 px to 4"}


def test_a_decoder_of_another_kind_or_size_is_left_out_whole_and_named(model):
    for sizes in ({"decoder": "cross"}, {"decoder_width": 32}, {"decoder_depth": 1}):
        target = _fresh(**sizes)
        before = {name: value.clone() for name, value in target.state_dict().items()}
        fit = load_weights(target, official_state(model))
        assert _same(target.encoder, model.encoder)
        for name, value in target.state_dict().items():
            assert name.startswith("encoder.") or torch.equal(value, before[name]), name
        theirs = {name for name in official_state(model) if name not in model.encoder.state_dict()}
        assert set(fit.left_out) == theirs
        assert "missing   mask_token, decoder_pos_embed" in fit.describe()
        assert "decoder_blocks.0-1 (24 tensors)" in fit.describe()


def test_simmim_takes_an_encoder_from_anywhere_and_its_head_from_its_like(model):
    simmim = SimMIM(TINY)
    fit = load_weights(simmim, official_state(model))
    assert _same(simmim.encoder, model.encoder)
    assert fit.missing == ["mask_token", "decoder_pred.weight", "decoder_pred.bias"]
    again = SimMIM(TINY)
    state = {name.removeprefix("encoder."): v for name, v in simmim.state_dict().items()}
    assert not load_weights(again, state).missing
    assert _same(again, simmim)


def test_an_encoder_alone_leaves_the_decoder_as_it_was(model):
    target = _fresh()
    fit = load_weights(target, model.encoder.state_dict())
    assert _same(target.encoder, model.encoder)
    assert not fit.left_out
    assert {name.split(".")[0] for name in fit.missing} == {
        "mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm",
        "decoder_pred",
    }  # fmt: skip


def test_a_classifiers_head_and_pooled_norm_are_left_out_by_name(model):
    weights = model.encoder.state_dict()
    weights |= {"head.weight": torch.ones(10, 24), "head.bias": torch.ones(10)}
    weights["fc_norm.weight"] = weights.pop("norm.weight")
    target = _fresh()
    fit = load_encoder_weights(target.encoder, weights)
    assert fit.left_out == ["head.weight", "head.bias", "fc_norm.weight"]
    assert fit.missing == ["norm.weight"]
    assert "missing   norm.weight: as initialised" in fit.describe()
    assert "left out  head.weight, head.bias, fc_norm.weight" in fit.describe()


def test_positions_without_one_for_the_class_token_get_zeros(model):
    weights = model.encoder.state_dict()
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    target = _fresh()
    load_encoder_weights(target.encoder, weights)
    assert torch.equal(target.encoder.pos_embed[:, 1:], model.encoder.pos_embed[:, 1:])
    assert not target.encoder.pos_embed[:, 0].any()


@pytest.mark.parametrize(("sizes", "here"), [({"width": 48}, "width 48 and depth 2"),
                                             ({"depth": 3}, "width 24 and depth 3")])  # fmt: skip
def test_another_width_or_depth_is_an_error_that_names_both(model, sizes, here):
    with pytest.raises(ValueError, match=f"width 24 and depth 2, and this model's has {here}"):
        load_weights(_fresh(**sizes), official_state(model))


def test_blocks_of_another_kind_are_an_error_not_a_loss(model):
    for name in ("blocks.0.ls1.gamma", "reg_token", "blocks.1.attn.q_norm.weight"):
        with pytest.raises(ValueError, match="of another kind: it has"):
            load_weights(_fresh(), {**official_state(model), name: torch.ones(24)})


def test_a_tensor_of_another_shape_or_one_that_is_gone_is_an_error(model):
    weights = model.encoder.state_dict()
    narrow = {**weights, "blocks.0.mlp.fc1.weight": torch.ones(48, 24)}
    with pytest.raises(ValueError, match=r"fc1\.weight is \[48, 24\], and here \[96, 24\]"):
        load_encoder_weights(_fresh().encoder, narrow)
    del weights["blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"not whole: blocks\.0-0"):
        load_encoder_weights(_fresh().encoder, weights)
    with pytest.raises(ValueError, match="no ViT encoder"):
        load_encoder_weights(_fresh().encoder, {"conv1.weight": torch.ones(3)})


def test_sizes_are_read_off_the_shapes(model):
    assert encoder_sizes(model.encoder.state_dict()) == EncoderSizes(24, 2, 8, 32)
    large = {
        "patch_embed.proj.weight": torch.empty(1024, 3, 16, 16),
        "pos_embed": torch.empty(1, 1 + math.prod((14, 14)), 1024),
        "blocks.23.norm1.weight": torch.empty(1024),
    }
    assert encoder_sizes(large) == EncoderSizes(1024, 24, 16, 224)
