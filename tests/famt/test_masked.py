import dataclasses

import pytest
import torch
from samples import TINY, split_pixels

from famt.masked import MaskedModel
from famt.methods import METHODS
from famt.sampling import sample_patches


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
