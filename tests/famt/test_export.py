import dataclasses

import pytest
import torch
from samples import TINY

from famt.export import from_transformers, official_state, to_transformers
from famt.mae import MaskedAutoencoder

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
    *(f"decoder_blocks.{n}.{key}" for n in range(2) for key in _BLOCK),
}  # fmt: skip


def test_all_weights_go_by_the_official_names():
    assert set(official_state(MaskedAutoencoder(TINY))) == OFFICIAL


def test_the_cross_decoder_has_no_official_names_but_its_encoder_exports():
    own = MaskedAutoencoder(TINY)
    cross = MaskedAutoencoder(dataclasses.replace(TINY, decoder="cross"))
    with pytest.raises(ValueError, match="no place for this model's cross decoder"):
        official_state(cross)
    assert cross.encoder.state_dict().keys() == own.encoder.state_dict().keys()


def test_the_names_of_transformers_and_back_lose_no_bit():
    state = official_state(MaskedAutoencoder(TINY))
    theirs = to_transformers(state)
    assert len(theirs) == len(state) + 4 * 4  # two tensors become six in each of four blocks
    for spelling in (
        theirs,
        {name.removeprefix("vit."): value for name, value in theirs.items()},
    ):
        back = from_transformers(spelling)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_names_of_transformers_without_a_counterpart_stay_as_they_are():
    extra = {"pooler.dense.weight": torch.ones(2), "classifier.bias": torch.ones(2)}
    assert from_transformers(extra).keys() == extra.keys()
    with pytest.raises(KeyError):
        to_transformers({"head.weight": torch.ones(2)})
