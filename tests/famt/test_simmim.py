"""SimMIM against a naive restatement of its paper, and what it must not look at."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from samples import split_pixels

from famt.mask_units import split_of_patches
from famt.methods import METHODS
from famt.models import ModelConfig
from famt.patches import normalise_images
from famt.sampling import predict_some, sample_patches
from famt.simmim import SimMIM

TINY = ModelConfig(
    image_size=32, patch_size=4, width=24, depth=2, heads=3, **METHODS["simmim"].defaults
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SimMIM(TINY)
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator)


def _split(mask, throw):
    units = sample_patches(torch.ones(3, 16), mask, throw, torch.Generator().manual_seed(2))
    return split_of_patches(units, 2)


def _loss(model, images, split, weights=None):
    visible, masked = split_pixels(images, split, 4)
    return model(visible, masked, split, weights)[0]


def _naive_loss(model, images, masked):
    """Every patch is embedded, tokens are put in place of the masked ones, then positions, the
    whole timm ViT, a linear head on every patch, and L1 over the masked pixels."""
    encoder, state = model.encoder, model.state_dict()
    x = normalise_images(images)
    tokens = encoder.patch_embed(x)
    for b in range(len(images)):
        for n in masked[b].tolist():
            tokens[b, n] = state["mask_token"][0, 0]
    tokens = torch.cat([encoder.cls_token.expand(len(images), -1, -1), tokens], 1)
    tokens = encoder.norm(encoder.blocks(tokens + encoder.pos_embed))[:, 1:]
    predicted = tokens @ state["decoder_pred.weight"].T + state["decoder_pred.bias"]
    error = 0.0
    for b in range(len(images)):
        for n in masked[b].tolist():
            top, left = n // 8 * 4, n % 8 * 4
            target = x[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
            error += F.l1_loss(predicted[b, n], target)
    return error / masked.numel()


@torch.no_grad()
def test_plain_simmim_equals_a_naive_restatement(model, images):
    split = _split(0.6, 0.0)
    torch.testing.assert_close(
        _loss(model, images, split), _naive_loss(model, images, split.masked)
    )


@torch.no_grad()
def test_the_encoder_sees_visible_and_predicted_tokens_alone(model, images):
    split = predict_some(_split(0.44, 0.26), 0.5)
    lengths = set()
    model.encoder.blocks[0].register_forward_hook(
        lambda _module, _inputs, out: lengths.add(out.shape[1])
    )
    _loss(model, images, split)
    assert lengths == {1 + split.visible.shape[1] + split.masked.shape[1] // 2}


def test_a_cross_decoder_is_refused():
    with pytest.raises(ValueError, match="no decoder"):
        SimMIM(dataclasses.replace(TINY, decoder="cross"))
