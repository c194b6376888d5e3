"""Fused blocks against hooks on timm's own blocks, and what stays the same without them."""

import dataclasses

import pytest
import torch
from samples import split_pixels

from famt.export import encoder_state, official_state
from famt.methods import METHODS
from famt.models import ModelConfig
from famt.sampling import sample_patches

PLAIN = ModelConfig(
    image_size=32, patch_size=8, width=24, depth=5, heads=3,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
)  # fmt: skip


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    split = sample_patches(torch.ones(3, 16), 0.45, 0.40)
    visible, masked = split_pixels(images, split, 8)
    return visible, masked, split


@torch.no_grad()
def test_the_decoder_is_given_the_weighted_mean_of_projected_blocks(batch):
    visible, _, split = batch
    torch.manual_seed(0)
    model = METHODS["mae"](dataclasses.replace(PLAIN, fused=(0, 2)))
    model.fusion.weights.copy_(torch.tensor([0.3, -1.0, 2.0]))
    outputs = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    latent = model.encode(visible, split.visible)
    assert len(outputs) == 5
    state = model.state_dict()
    total, expected = 0.0, 0.0
    for weight, number, column in ((0.3, 0, 0), (-1.0, 2, 1), (2.0, 4, None)):
        tokens = outputs[number]
        if column is not None:
            name = f"fusion.projections.{column}"
            tokens = tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        share = torch.tensor(weight).exp()
        total, expected = total + share, expected + share * tokens
    torch.testing.assert_close(latent, model.encoder.norm(expected / total), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_reaches_every_part_of_a_fused_model(method, batch):
    torch.manual_seed(0)
    model = METHODS[method](dataclasses.replace(PLAIN, fused=(0, 1, 3)))
    model(*batch)[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("method", METHODS)
def test_fusion_adds_its_own_keys_alone_and_none_when_it_is_off(method):
    off = METHODS[method](PLAIN)
    on = METHODS[method](dataclasses.replace(PLAIN, fused=(1,)))
    added = on.state_dict().keys() - off.state_dict().keys()
    assert added == {
        "fusion.weights", "fusion.projections.0.weight", "fusion.projections.0.bias"
    }  # fmt: skip
    assert encoder_state(on).keys() == encoder_state(off).keys()
    with pytest.raises(ValueError, match=r"fused blocks|SimMIM head"):
        official_state(on)


@pytest.mark.parametrize("fused", [(2, 1), (1, 1), (4,), (-1,)])
def test_blocks_out_of_order_or_beyond_the_last_but_one_are_refused(fused):
    with pytest.raises(ValueError, match="rising numbers of blocks from 0 to 3"):
        dataclasses.replace(PLAIN, fused=fused)
