import dataclasses

import pytest
import timm
import torch

from famt.export import encoder_state, load_official, official_state
from famt.mae import MaskedAutoencoder
from famt.models import MODELS, ModelConfig

TINY = ModelConfig(
    image_size=32,
    patch_size=8,
    width=24,
    depth=2,
    heads=3,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)

# Key names of the published MAE checkpoints, one block each of encoder and decoder.
_BLOCK = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
          "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
          "mlp.fc2.weight", "mlp.fc2.bias"]  # fmt: skip
OFFICIAL = {
    "cls_token", "pos_embed", "mask_token", "decoder_pos_embed",
    "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
    "decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight", "decoder_norm.bias",
    "decoder_pred.weight", "decoder_pred.bias",
    *(f"blocks.{n}.{key}" for n in range(2) for key in _BLOCK),
    *(f"decoder_blocks.0.{key}" for key in _BLOCK),
}  # fmt: skip


def test_all_weights_go_by_the_official_names():
    assert set(official_state(MaskedAutoencoder(TINY))) == OFFICIAL


def test_weights_under_the_official_names_load():
    source, target = MaskedAutoencoder(TINY), MaskedAutoencoder(TINY)
    load_official(target, official_state(source))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_a_missing_or_unknown_key_is_named():
    state = official_state(MaskedAutoencoder(TINY))
    state["head.weight"] = state.pop("norm.bias")
    with pytest.raises(RuntimeError, match=r"encoder\.norm\.bias[\s\S]*head\.weight"):
        load_official(MaskedAutoencoder(TINY), state)


def test_timm_loads_the_encoder_and_agrees():
    torch.manual_seed(0)
    model = MaskedAutoencoder(MODELS["vit_tiny"]).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(encoder_state(model))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.forward_features(images), model.encoder.forward_features(images)
        )


def test_the_cross_decoder_has_no_official_names_but_its_encoder_exports():
    own = MaskedAutoencoder(TINY)
    cross = MaskedAutoencoder(dataclasses.replace(TINY, decoder="cross"))
    with pytest.raises(ValueError, match="encoder_state"):
        official_state(cross)
    with pytest.raises(ValueError, match="cross decoder"):
        load_official(cross, official_state(own))
    assert encoder_state(cross).keys() == encoder_state(own).keys()
