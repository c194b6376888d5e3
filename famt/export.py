"""Map weights to and from the key names of timm, transformers and the MAE authors.

The common names are those of the MAE authors' checkpoints, here called official. For the encoder
they are also timm's (`blocks.0.attn.qkv.weight`), ViTDet's, and ours without the prefix `encoder.`;
for the decoder they are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product

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
_QKV = ("query", "key", "value")
_LAYER = {
    "norm1": ["layernorm_before"],
    "attn.qkv": [f"attention.attention.{name}" for name in _QKV],
    "attn.proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
# Parts of names in transformers 5, in memory and in some files it writes.
_SINCE_5 = {
    "vit.layers.": "vit.encoder.layer.",
    "decoder.decoder_encoder.layer.": "decoder.decoder_layers.",  # on writing, by mistake
    **{f".attention.{name[0]}_proj.": f".attention.attention.{name}." for name in _QKV},
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}


def is_decoder(name: str) -> bool:
    """Whether a name is the decoder's, or that of its input layers."""
    return name.startswith(("decoder_", "fusion.")) or name == "mask_token"


def official_state(model: MaskedModel) -> dict[str, Tensor]:
    """All weights under the official names.

    Raises:
        ValueError: the model has a part that MAE's checkpoints lack, such as a cross decoder.
    """
    if model.config.timm or model.unofficial:
        part = f"{model.config.timm} of timm" if model.config.timm else model.unofficial
        raise ValueError(
            f"the official MAE keys have no place for this model's {part}; "
            "`encoder.state_dict()` gives its encoder's weights"
        )
    return {key.removeprefix(_ENCODER): value for key, value in model.state_dict().items()}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to those of `transformers.ViTMAEForPreTraining`; values are not copied.

    The joint projection becomes transformers' query, key and value.

    Raises:
        KeyError: a name is not one of MAE's.
    """
    known = dict(_names(state))
    return {
        theirs: part
        for ours, value in state.items()
        for theirs, part in zip(known[ours], value.chunk(len(known[ours])), strict=True)
    }


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_transformers`, for weights of any `ViT...` or `ViTMAE...` class.

    Accepts names on the hub and those of transformers 5, with and without the prefix `vit.`. Names
    without a counterpart (`pooler`, `classifier`) stay as they are.
    """
    left = {}
    for name, value in state.items():
        on_hub = name if name.startswith(("vit.", "decoder.")) else f"vit.{name}"
        for new, old in _SINCE_5.items():
            on_hub = on_hub.replace(new, old)
        left[on_hub] = name, value
    found = {}
    for ours, theirs in _names(left):
        if left.keys() >= {*theirs}:
            parts = [left.pop(each)[1] for each in theirs]
            found[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found | dict(left.values())


def _names(alike: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Official names, each with the one or three of transformers; blocks as names have them."""
    for (ours, theirs), kind in product(_WHOLE.items(), ("", ".weight", ".bias")):
        yield ours + kind, [theirs + kind]
    numbers = dict.fromkeys(re.findall(r"\.(\d+)\.", " ".join(alike)))
    for (ours, theirs), n, (part, parts), kind in product(
        _LAYERS.items(), numbers, _LAYER.items(), ("weight", "bias")
    ):
        yield f"{ours}.{n}.{part}.{kind}", [f"{theirs}.{n}.{each}.{kind}" for each in parts]
