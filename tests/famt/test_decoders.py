"""The cross decoder against a naive loop, and what its predictions may depend on."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from samples import TINY

from famt.mae import MaskedAutoencoder
from famt.sampling import PatchSplit, sample_patches

PIXELS = 8 * 8 * 3


def _model(decoder="cross"):
    torch.manual_seed(0)
    model = MaskedAutoencoder(dataclasses.replace(TINY, decoder=decoder))
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(2)
    return sample_patches(torch.ones(3, 16), 0.45, 0.40, generator)


@pytest.fixture
def latent(split):
    return torch.randn(
        3, 1 + split.visible.shape[1], 24, generator=torch.Generator().manual_seed(3)
    )


def _norm(x, state, name):
    centred = x - x.mean()
    return (
        centred / (centred.square().mean() + 1e-6) ** 0.5 * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def _linear(x, state, name):
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def _one_query(token, seen, state, name):
    """One masked token `[D]` through one block, beside a list of visible tokens `[D]`."""
    query = _linear(_norm(token, state, f"{name}.norm1"), state, f"{name}.query")
    mixed, size = [], TINY.decoder_width // TINY.decoder_heads
    for head in range(TINY.decoder_heads):
        part = slice(head * size, (head + 1) * size)
        total, mean = 0.0, torch.zeros(size)
        for other in seen:
            key, value = _linear(other, state, f"{name}.key_value").chunk(2)
            weight = math.exp(float(query[part] @ key[part]) / size**0.5)
            total, mean = total + weight, mean + weight * value[part]
        mixed.append(mean / total)
    token = token + _linear(torch.cat(mixed), state, f"{name}.proj")
    inner = _linear(_norm(token, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    return token + _linear(F.gelu(inner), state, f"{name}.mlp.fc2")


@torch.no_grad()
def test_the_cross_decoder_equals_a_loop_over_masked_patches(latent, split):
    model = _model()
    state = model.state_dict()
    position = state["decoder_pos_embed"][0]
    actual = model.decode(latent, split)
    for b in range(3):
        at = [0] + [1 + n for n in split.visible[b].tolist()]
        seen = [
            _linear(token, state, "decoder_embed") + position[n]
            for token, n in zip(latent[b], at, strict=True)
        ]
        for m, n in enumerate(split.masked[b].tolist()):
            token = state["mask_token"][0, 0] + position[1 + n]
            for block in range(TINY.decoder_depth):
                token = _one_query(token, seen, state, f"decoder_blocks.{block}")
            expected = _linear(_norm(token, state, "decoder_norm"), state, "decoder_pred")
            torch.testing.assert_close(actual[b, m], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "depends"), [("cross", False), ("self", True)])
def test_only_with_self_does_a_prediction_depend_on_the_other_masked_patches(
    latent, split, decoder, depends
):
    model = _model(decoder)
    others = torch.cat([split.masked[:, :1], split.thrown], dim=1)
    alone = model.decode(latent, split)[:, 0]
    among_others = model.decode(latent, PatchSplit(others, split.masked[:, 1:], split.visible))
    difference = (alone - among_others[:, 0]).abs().max()
    assert (difference > 1e-2) if depends else (difference < 1e-5)


def _patches(split):
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(*index.shape, PIXELS, generator=generator)
        for index in (split.visible, split.masked)
    )


def test_the_gradient_reaches_every_parameter_through_the_visible_tokens(split):
    model = _model()
    model(*_patches(split), split)[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_every_layer_works_on_visible_or_on_masked_tokens_alone(split):
    model, lengths = _model(), set()
    for module in [*model.encoder.blocks.modules(), *model.decoder_blocks.modules()]:
        module.register_forward_hook(lambda _module, _inputs, out: lengths.add(out.shape[-2]))
    model(*_patches(split), split)
    assert lengths == {1 + split.visible.shape[1], split.masked.shape[1]}


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_under_bf16_autocast_loss_and_gradients_are_finite(split, decoder):
    torch.manual_seed(0)
    model = MaskedAutoencoder(dataclasses.replace(TINY, decoder=decoder))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(*_patches(split), split)
    loss.backward()
    exact, _ = model(*_patches(split), split)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_both_decoders_have_the_same_number_of_parameters():
    """Only who attends to whom differs, so a comparison is fair."""
    self_, cross = (sum(p.numel() for p in _model(d).parameters()) for d in ("self", "cross"))
    assert self_ == cross
