"""Fused blocks against hooks on timm's own blocks, and what stays the same without them."""

import dataclasses

import pytest
import torch
from samples import TINY

from famt.export import official_state
from famt.methods import METHODS

PLAIN = dataclasses.replace(TINY, depth=5)


@torch.no_grad()
def test_the_decoder_is_given_the_weighted_mean_of_projected_blocks():
    torch.manual_seed(0)
    model = METHODS["mae"](dataclasses.replace(PLAIN, fused=(0, 2)))
    model.fusion.weights.copy_(torch.tensor([0.3, -1.0, 2.0]))
    outputs = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    latent = model.encode(torch.randn(3, 3, 192), torch.rand(3, 16).argsort(1)[:, :3])
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
def test_fusion_adds_its_own_keys_alone_and_none_when_it_is_off(method):
    off = METHODS[method](PLAIN)
    on = METHODS[method](dataclasses.replace(PLAIN, fused=(1,)))
    added = on.state_dict().keys() - off.state_dict().keys()
    assert added == {
        "fusion.weights", "fusion.projections.0.weight", "fusion.projections.0.bias"
    }  # fmt: skip
    assert on.encoder.state_dict().keys() == off.encoder.state_dict().keys()
    with pytest.raises(ValueError, match=r"fused blocks|SimMIM head"):
        official_state(on)


@pytest.mark.parametrize("fused", [(2, 1), (1, 1), (4,), (-1,)])
def test_blocks_out_of_order_or_beyond_the_last_but_one_are_refused(fused):
    with pytest.raises(ValueError, match="rising numbers of blocks from 0 to 3"):
        dataclasses.replace(PLAIN, fused=fused)
