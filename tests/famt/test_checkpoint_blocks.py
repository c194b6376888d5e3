"""Blocks that are computed again in the backward pass: the same step in less memory."""

import dataclasses

import pytest
import torch
from samples import TINY, split_pixels
from torch.autograd.graph import saved_tensors_hooks

from famt.methods import METHODS
from famt.sampling import sample_patches


def _step(model, images):
    """Loss and gradients of a step, and the bytes that its forward pass keeps of activations."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    split = sample_patches(torch.ones(4, 16), 0.5, 0.25, torch.Generator().manual_seed(0))
    model.zero_grad()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(*split_pixels(images, split, model.config.patch_size), split)
    loss.backward()
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    return loss, [each.grad for each in model.parameters()], sum(kept.values()) - weights


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mae", {}),
        ("mae", {"decoder": "cross", "fused": (0,)}),
        ("simmim", {"normalise_targets": False}),
    ],
)
def test_checkpointed_blocks_take_the_same_step_in_less_memory(method, changes):
    torch.manual_seed(0)
    model = METHODS[method](dataclasses.replace(TINY, depth=6, decoder_depth=4, **changes))
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    loss, gradients, memory = _step(model, images)
    model.checkpoint_blocks = True
    again, same, less = _step(model, images)
    assert torch.equal(loss, again)
    for a, b in zip(gradients, same, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert less < memory / 3
