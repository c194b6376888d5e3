import dataclasses

import pytest
import torch
from samples import TINY, split_pixels
from torch.autograd.graph import saved_tensors_hooks

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.sampling import PatchSplit, sample_patches


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalise_targets", [True, False])
@torch.no_grad()
def test_a_reconstruction_differs_from_the_pixels_as_the_prediction_from_the_target(
    method, normalise_targets
):
    torch.manual_seed(0)
    model = METHODS[method](dataclasses.replace(TINY, normalise_targets=normalise_targets))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    split = sample_patches(torch.ones(2, 16), 0.45, 0.40)
    visible, masked = split_pixels(images, split, 8)
    difference = model.reconstruct(visible, masked, split) - masked
    expected = model.predict(visible, split) - model.target(masked)
    if normalise_targets:
        expected = expected * (masked.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)


METHODS_AND_DECODERS = [("mae", "self"), ("mae", "cross"), ("simmim", "self")]


def _step(model, images, split):
    """Loss and gradients by name, and the bytes that the forward pass keeps of activations."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model.zero_grad()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(*split_pixels(images, split, model.config.patch_size), split)
    loss.backward()
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = {"loss": loss, **{name: each.grad for name, each in trained.items()}}
    return found, sum(kept.values()) - weights


@pytest.mark.parametrize(("method", "decoder"), METHODS_AND_DECODERS)
def test_the_loss_reaches_every_weight_and_thrown_patches_change_no_bit_of_it(method, decoder):
    torch.manual_seed(0)
    model = METHODS[method](dataclasses.replace(TINY, depth=3, decoder=decoder, fused=(0, 1)))
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    split = sample_patches(torch.ones(3, 16), 0.45, 0.40)
    scrambled = images.clone()
    for b, thrown in enumerate(split.thrown.tolist()):
        for n in thrown:
            top, left = n // 4 * 8, n % 4 * 8
            scrambled[b, top : top + 8, left : left + 8] = torch.randint(0, 256, (8, 8, 3))
    assert not torch.equal(images, scrambled)
    elsewhere = PatchSplit(split.masked, torch.zeros_like(split.thrown), split.visible)
    found, _ = _step(model, images, split)
    for name, value in found.items():
        assert value.abs().max() > 0, name
    for pixels, other in ((scrambled, split), (images, elsewhere)):
        again, _ = _step(model, pixels, other)
        assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize(("method", "decoder"), METHODS_AND_DECODERS)
def test_checkpointed_blocks_take_the_same_step_in_less_memory(method, decoder):
    torch.manual_seed(0)
    sizes = {"depth": 6, "decoder_depth": 4, "decoder": decoder, "fused": (0,)}
    model = METHODS[method](dataclasses.replace(TINY, **sizes))
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    split = sample_patches(torch.ones(4, 16), 0.5, 0.25)
    found, memory = _step(model, images, split)
    model.checkpoint_blocks = True
    again, less = _step(model, images, split)
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    assert less < memory / 3


class _AllGrey(MaskedModel):
    """The least that a method must bring."""

    def predict(self, visible, split):
        return torch.zeros(*split.predicted.shape, visible.shape[-1])

    def error(self, difference):
        return difference.abs()


def test_a_method_is_a_prediction_and_an_error():
    model = _AllGrey(dataclasses.replace(TINY, normalise_targets=False))
    masked, split = torch.randn(2, 7, 192), sample_patches(torch.ones(2, 16), 0.45, 0.40)
    loss, errors = model(torch.randn(2, 3, 192), masked, split)
    torch.testing.assert_close(loss, masked.abs().mean())
    torch.testing.assert_close(errors, masked.abs().mean(-1))


def test_the_encoder_stays_in_eval_mode_and_nothing_in_it_depends_on_the_mode():
    model = METHODS["mae"](TINY)
    assert not any("BatchNorm" in type(each).__name__ for each in model.encoder.modules())
    assert all(getattr(each, "p", 0.0) == 0 for each in model.encoder.modules())
    assert model.train().training
    assert not model.encoder.training
