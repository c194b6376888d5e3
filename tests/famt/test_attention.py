import dataclasses

import pytest
import timm
import torch

from famt.attention import attention_scores, cls_attention, last_attention
from famt.mae import MaskedAutoencoder
from famt.models import MODELS


@pytest.fixture
def attn():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 6, 6, generator=generator).softmax(-1)


def test_attention_scores_equal_the_formula_written_as_loops(attn):
    batch, heads, tokens, _ = attn.shape
    scores = attention_scores(attn)
    for b in range(batch):
        for n in range(1, tokens):
            by_cls = by_patches = 0.0
            for h in range(heads):
                back = sum(attn[b, h, m, 0] for m in range(1, tokens)) / (tokens - 1)
                by_cls += attn[b, h, 0, n] * back / heads
                seen = sum(attn[b, h, m, n] for m in range(1, tokens)) / (tokens - 1)
                by_patches += seen * attn[b, h, 0, 0] / heads
            torch.testing.assert_close(scores[b, n - 1], by_cls + by_patches)


def test_cls_attention_scales_each_head_then_averages(attn):
    scores = cls_attention(attn)
    row = attn[0, :, 0, 1:]
    expected = torch.stack([(h - h.min()) / (h.max() - h.min()) for h in row]).mean(0)
    torch.testing.assert_close(scores[0], expected)


def test_a_head_without_preference_is_uniform_not_nan():
    attn = torch.full((1, 2, 5, 5), 0.2)
    assert (cls_attention(attn) == 1).all()
    scores = attention_scores(attn)
    assert (scores == scores[0, 0]).all()


@pytest.mark.parametrize("shape", [(1, 2, 5), (1, 2, 5, 4), (1, 2, 1, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="N\\+1"):
        attention_scores(torch.zeros(shape))


def _plain_attention(encoder, images):
    """The last block's attention matrix as its own unfused code path computes it."""
    attention = encoder.blocks[-1].attn
    attention.fused_attn = False
    caught = []
    hook = attention.attn_drop.register_forward_hook(lambda *call: caught.append(call[2]))
    encoder.eval()
    with torch.no_grad():
        encoder.forward_features(images)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, qk_norm=True),
        lambda: MaskedAutoencoder(MODELS["vit_nano"]).encoder,
    ],
    ids=["timm", "timm with qk norm", "ours"],
)
def test_last_attention_equals_the_blocks_own(make):
    torch.manual_seed(0)
    encoder = make()
    images = torch.randn(2, 3, *encoder.patch_embed.img_size)
    actual = last_attention(encoder, images)
    torch.testing.assert_close(actual, _plain_attention(encoder, images))
    torch.testing.assert_close(actual.sum(-1), torch.ones_like(actual[..., 0]))


def test_last_attention_leaves_the_encoder_as_it_was():
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.5).train()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(last_attention(encoder, images), last_attention(encoder, images))
    assert encoder.training
    assert encoder.blocks[3].training
    assert all(parameter.grad is None for parameter in encoder.parameters())


def _ours(size):
    return dataclasses.replace(MODELS["vit_nano"], image_size=size).encoder()


def _with_registers(size):
    return timm.create_model("vit_tiny_patch16_224", img_size=size, reg_tokens=4, init_values=1.0)


@pytest.mark.parametrize(
    ("make", "size"), [(_ours, 16), (_with_registers, 32), (_with_registers, 48)]
)
def test_at_other_sizes_positions_lie_in_between_and_nobody_looks_at_registers(make, size):
    torch.manual_seed(0)
    encoder, other = make(32).eval(), make(size).eval()
    images = torch.randn(2, 3, size, size)
    prefix, weights = encoder.num_prefix_tokens, encoder.state_dict()
    side, grid = (each.patch_embed.grid_size[0] for each in (encoder, other))
    patches = weights["pos_embed"][0, prefix:].T.view(1, -1, side, side)
    patches = torch.nn.functional.interpolate(patches, grid, mode="bicubic", antialias=True)
    own = weights["pos_embed"][:, :prefix]
    weights["pos_embed"] = torch.cat([own, patches.flatten(2).transpose(1, 2)], dim=1)
    other.load_state_dict(weights)
    whole = _plain_attention(other, images)
    kept = [0, *range(prefix, prefix + grid**2)]
    kept = whole[:, :, kept][..., kept]
    torch.testing.assert_close(last_attention(encoder, images), kept / kept.sum(-1, keepdim=True))


def test_without_a_class_token_there_are_no_scores():
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, class_token=False, global_pool="avg"
    )
    with pytest.raises(ValueError, match="no class token"):
        last_attention(encoder, torch.zeros(1, 3, 32, 32))
