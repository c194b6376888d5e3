"""The masked autoencoder and its decoders against naive restatements of their papers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from samples import TINY, split_pixels

from famt.mae import MaskedAutoencoder
from famt.patches import gather_patches, normalise, normalise_images
from famt.sampling import PatchSplit, predict_some, sample_patches


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskedAutoencoder(TINY)


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def _split(mask, throw, batch=3, patches=16):
    weights = torch.ones(batch, patches)
    return sample_patches(weights, mask, throw, torch.Generator().manual_seed(2))


def _loss(model, images, split):
    size = model.config.patch_size
    return model(*split_pixels(images, split, size), split)[0]


def _layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def _linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _block(x, state, name, heads):
    batch, tokens, width = x.shape
    qkv = _linear(_layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
    q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attn = (q @ k.transpose(-2, -1) / (width // heads) ** 0.5).softmax(-1)
    mixed = (attn @ v).transpose(1, 2).reshape(batch, tokens, width)
    x = x + _linear(mixed, state, f"{name}.attn.proj")
    hidden = F.gelu(_linear(_layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + _linear(hidden, state, f"{name}.mlp.fc2")


def _naive_mae_loss(state, config, images, visible):
    """MAE as its paper tells it: embed every patch, drop the hidden ones, fill in mask tokens in
    raster order, predict every patch, and average the error over the hidden ones."""
    x = normalise_images(images)
    tokens = F.conv2d(
        x,
        state["encoder.patch_embed.proj.weight"],
        state["encoder.patch_embed.proj.bias"],
        stride=config.patch_size,
    )
    tokens = tokens.flatten(2).transpose(1, 2) + state["encoder.pos_embed"][:, 1:]
    batch, count, _ = tokens.shape
    cls = state["encoder.cls_token"] + state["encoder.pos_embed"][:, :1]
    kept = torch.stack([tokens[b, visible[b]] for b in range(batch)])
    latent = torch.cat([cls.expand(batch, -1, -1), kept], 1)
    for n in range(config.depth):
        latent = _block(latent, state, f"encoder.blocks.{n}", config.heads)
    latent = _linear(_layer_norm(latent, state, "encoder.norm"), state, "decoder_embed")
    full = state["mask_token"].expand(batch, count, -1).clone()
    for b in range(batch):
        full[b, visible[b]] = latent[b, 1:]
    full = torch.cat([latent[:, :1], full], 1) + state["decoder_pos_embed"]
    for n in range(config.decoder_depth):
        full = _block(full, state, f"decoder_blocks.{n}", config.decoder_heads)
    predicted = _linear(_layer_norm(full, state, "decoder_norm"), state, "decoder_pred")[:, 1:]
    error, hidden = 0.0, 0
    side = config.image_size // config.patch_size
    for b in range(batch):
        for n in set(range(count)) - set(visible[b].tolist()):
            top, left = n // side * config.patch_size, n % side * config.patch_size
            patch = x[b, :, top : top + config.patch_size, left : left + config.patch_size]
            target = patch.permute(1, 2, 0).flatten()
            if config.normalise_targets:
                target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            error = error + ((predicted[b, n] - target) ** 2).mean()
            hidden += 1
    return error / hidden


@pytest.mark.parametrize("normalise_targets", [True, False])
def test_plain_mae_equals_a_naive_restatement(images, normalise_targets):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, normalise_targets=normalise_targets)
    model = MaskedAutoencoder(config)
    split = _split(0.75, 0.0)
    expected = _naive_mae_loss(model.state_dict(), config, images, split.visible)
    torch.testing.assert_close(_loss(model, images, split), expected, rtol=1e-5, atol=1e-6)


def test_all_patches_visible_is_the_plain_timm_forward(model, images):
    index = torch.arange(16).expand(3, -1)
    tokens = model.encode(normalise(gather_patches(images, index, 8)), index)
    expected = model.encoder.forward_features(normalise_images(images))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_only_predicted_patches_are_decoded_and_enter_the_loss(model, images):
    split = predict_some(_split(0.45, 0.40), 0.5, "random", torch.Generator().manual_seed(3))
    alone = PatchSplit(split.predicted, split.thrown, split.visible)
    assert split.predicted.shape == (3, 3)
    lengths = set()
    for block in model.decoder_blocks:
        block.register_forward_hook(lambda _module, _inputs, out: lengths.add(out.shape[1]))
    assert torch.equal(_loss(model, images, split), _loss(model, images, alone))
    assert lengths == {1 + split.visible.shape[1] + 3}


def test_loss_weights_multiply_each_patchs_error(model, images):
    split, size = _split(0.45, 0.40), model.config.patch_size
    visible, masked = split_pixels(images, split, size)
    weights = torch.rand(split.masked.shape)
    expected = 0.0
    with torch.no_grad():
        predicted = model.decode(model.encode(visible, split.visible), split)
        for b in range(3):
            for m in range(split.masked.shape[1]):
                target = (masked[b, m] - masked[b, m].mean()) / (masked[b, m].var() + 1e-6) ** 0.5
                expected += float(weights[b, m] * ((predicted[b, m] - target) ** 2).mean())
        loss, _ = model(visible, masked, split, weights)
    assert loss.item() == pytest.approx(expected / weights.numel(), rel=1e-5)
    torch.testing.assert_close(
        model(visible, masked, split, torch.ones_like(weights))[0], model(visible, masked, split)[0]
    )


def _any_weights(decoder="cross"):
    torch.manual_seed(0)
    model = MaskedAutoencoder(dataclasses.replace(TINY, decoder=decoder))
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def latent():
    seen = _split(0.45, 0.40).visible.shape[1]
    return torch.randn(3, 1 + seen, 24, generator=torch.Generator().manual_seed(3))


def _one_query(token, seen, state, name):
    """One masked token `[D]` through one block, beside a list of visible tokens `[D]`."""
    query = _linear(_layer_norm(token, state, f"{name}.norm1"), state, f"{name}.query")
    mixed, size = [], TINY.decoder_width // TINY.decoder_heads
    for head in range(TINY.decoder_heads):
        part = slice(head * size, (head + 1) * size)
        total, mean = 0.0, torch.zeros(size)
        for other in seen:
            key, value = _linear(other, state, f"{name}.key_value").chunk(2)
            weight = (query[part] @ key[part] / size**0.5).exp()
            total, mean = total + weight, mean + weight * value[part]
        mixed.append(mean / total)
    token = token + _linear(torch.cat(mixed), state, f"{name}.proj")
    inner = _linear(_layer_norm(token, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    return token + _linear(F.gelu(inner), state, f"{name}.mlp.fc2")


@torch.no_grad()
def test_the_cross_decoder_equals_a_loop_over_masked_patches(latent):
    model, split = _any_weights(), _split(0.45, 0.40)
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
            expected = _linear(_layer_norm(token, state, "decoder_norm"), state, "decoder_pred")
            torch.testing.assert_close(actual[b, m], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "depends"), [("cross", False), ("self", True)])
def test_only_with_self_does_a_prediction_depend_on_the_other_masked_patches(
    latent, decoder, depends
):
    model, split = _any_weights(decoder), _split(0.45, 0.40)
    others = torch.cat([split.masked[:, :1], split.thrown], dim=1)
    alone = model.decode(latent, split)[:, 0]
    among_others = model.decode(latent, PatchSplit(others, split.masked[:, 1:], split.visible))
    difference = (alone - among_others[:, 0]).abs().max()
    assert (difference > 1e-2) if depends else (difference < 1e-5)


def test_every_layer_works_on_visible_or_on_masked_tokens_alone(images):
    model, split, lengths = _any_weights(), _split(0.45, 0.40), set()
    for module in [*model.encoder.blocks.modules(), *model.decoder_blocks.modules()]:
        module.register_forward_hook(lambda _module, _inputs, out: lengths.add(out.shape[-2]))
    _loss(model, images, split)
    assert lengths == {1 + split.visible.shape[1], split.masked.shape[1]}


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_under_bf16_autocast_loss_and_gradients_are_finite(images, decoder):
    torch.manual_seed(0)
    model, split = MaskedAutoencoder(dataclasses.replace(TINY, decoder=decoder)), _split(0.45, 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model, images, split)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, _loss(model, images, split), rtol=0.05, atol=0.0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_both_decoders_have_the_same_number_of_parameters():
    """Only who attends to whom differs, so a comparison is fair."""
    models = (_any_weights(decoder) for decoder in ("self", "cross"))
    assert len({sum(each.numel() for each in model.parameters()) for model in models}) == 1
