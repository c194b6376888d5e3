import pytest
import torch

from famt.methods import METHODS
from famt.models import MODELS
from famt.patches import gather_patches, normalise
from famt.sampling import sample_patches


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_from_a_split_batch(name):
    torch.manual_seed(0)
    model = METHODS[name](MODELS["vit_nano"])
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    split = sample_patches(torch.ones(2, 64), 0.45, 0.40)
    visible, masked = (
        normalise(gather_patches(images, index, 4)) for index in (split.visible, split.masked)
    )
    loss, _ = model(visible, masked, split)
    loss.backward()
    assert loss.ndim == 0
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )
