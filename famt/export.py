"""Map weights to and from the key names of timm, transformers and the MAE authors.

The common names are those of the MAE authors' checkpoints, here called official. For the encoder
they are also timm's (`blocks.0.attn.qkv.weight`), ViTDet's, and ours without the prefix `encoder.`;
for the decoder they are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from famt.masked import MaskedModel

_ENCODER = "encoder."

# Official name -> that of transformers, in the layout of the files on the Hugging Face hub.
_WHOLE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_LAYERS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_LAYER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
# Names of the same in transformers 5, in memory and in some files it writes.
_SINCE_5 = {
    **{f"attention.{name[0]}_proj": f"attention.attention.{name}" for name in _QKV},
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def is_decoder(name: str) -> bool:
    """Whether a name is the decoder's, or that of its input layers."""
    return name.startswith(("decoder_", "fusion.")) or name == "mask_token"


def encoder_state(model: MaskedModel) -> dict[str, Tensor]:
    """The encoder's weights as `timm.create_model("vit_...", num_classes=0)` loads them.

    timm's position embedding is a trained parameter of the same shape, so ours fits.
    """
    return dict(model.encoder.state_dict())


def official_state(model: MaskedModel) -> dict[str, Tensor]:
    """All weights under the official names.

    Raises:
        ValueError: the model has a part that MAE's checkpoints lack, such as a cross decoder.
    """
    _refuse_unofficial(model)
    return {key.removeprefix(_ENCODER): value for key, value in model.state_dict().items()}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to those of `transformers.ViTMAEForPreTraining`; values are not copied.

    The joint projection becomes transformers' query, key and value.

    Raises:
        KeyError: a name is not one of MAE's.
    """
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            stem, dot, kind = name.rpartition(".") if name not in _WHOLE else (name, "", "")
            theirs[_WHOLE[stem] + dot + kind] = value
            continue
        blocks, number, part, kind = block.groups()
        layer = f"{_LAYERS[blocks]}.{number}"
        if part == "attn.qkv":
            for which, third in zip(_QKV, value.chunk(3), strict=True):
                theirs[f"{layer}.attention.attention.{which}.{kind}"] = third
        else:
            theirs[f"{layer}.{_LAYER[part]}.{kind}"] = value
    return theirs


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_transformers`, for weights of any `ViT...` or `ViTMAE...` class.

    Accepts names on the hub and those of transformers 5, with and without the prefix `vit.`. Names
    without a counterpart (`pooler`, `classifier`) stay as they are.
    """
    whole = {theirs: ours for ours, theirs in _WHOLE.items()}
    layers = {theirs: ours for ours, theirs in _LAYERS.items()}
    layer = {theirs: ours for ours, theirs in _LAYER.items()}
    ours: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        hub_name = name if name.startswith(("vit.", "decoder.")) else f"vit.{name}"
        hub_name = re.sub(r"^vit\.layers\.", "vit.encoder.layer.", hub_name)
        # transformers 5 renames on writing, and mistakes `decoder_layers.` for `layers.`.
        hub_name = hub_name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
        match = re.fullmatch(
            r"(vit\.encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)", hub_name
        )
        if match is None:
            stem, dot, kind = (
                hub_name.rpartition(".") if hub_name not in whole else (hub_name, "", "")
            )
            ours[whole[stem] + dot + kind if stem in whole else name] = value
            continue
        stack, number, part, kind = match.groups()
        part = _SINCE_5.get(part, part)
        block = f"{layers[stack]}.{number}"
        which = part.removeprefix("attention.attention.")
        if which in _QKV:
            thirds.setdefault(f"{block}.attn.qkv.{kind}", {})[which] = value
        else:
            ours[f"{block}.{layer[part]}.{kind}" if part in layer else name] = value
    for name, parts in thirds.items():
        ours[name] = torch.cat([parts[which] for which in _QKV])
    return ours


def _refuse_unofficial(model: MaskedModel) -> None:
    if model.config.timm or model.unofficial:
        part = f"{model.config.timm} of timm" if model.config.timm else model.unofficial
        raise ValueError(
            f"the official MAE keys have no place for this model's {part}; "
            "`encoder_state` gives its encoder's weights"
        )
