"""Initial weights: of a run, an official MAE checkpoint, timm or transformers.

Sources that `--init` takes:

    runs/first, runs/first/checkpoint-00001000.pt    a run, or one of its checkpoints
    mae_pretrain_vit_base.pth, model.safetensors     weights named as in MAE, timm or transformers
    exported/                                        a folder of timm or transformers (config.json)
    timm:vit_base_patch16_224.mae                    a timm model by name
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.export import from_transformers, is_decoder
from famt.initial import Fit, encoder_sizes, load_encoder_weights, load_weights
from famt.masked import MaskedModel
from famt.models import MODELS, ModelConfig, timm_model
from famt.pipeline.errors import UserError
from famt.pipeline.storage import reason
from famt.train import checkpoint
from famt.train.config import TIMM

_KINDS = "a run, an MAE checkpoint, a file or folder of timm or transformers, or timm:<name>"
_TRANSFORMERS = "embeddings.patch_embeddings.projection.weight"


@dataclass(frozen=True)
class Initial:
    """Initial weights.

    Attributes:
        source: where they are from.
        weights: under official names (see `famt.export`).
        heads: number of attention heads, or None if the source does not say.
        timm: architecture in timm of an encoder other than MAE's ViT, else "".
    """

    source: str
    weights: dict[str, Tensor]
    heads: int | None
    timm: str = ""


def load_initial(model: MaskedModel, source: str) -> Fit:
    """Load a source's encoder into a model, and its decoder if that fits.

    Raises:
        FileNotFoundError: no such source.
        UserError: it has no encoder, or one that does not fit; names the source and both sizes.
    """
    initial = read_initial(source)
    return _load(initial, model.encoder, lambda: load_weights(model, initial.weights))


def build_initial_encoder(
    source: str, image_size: int | None = None, *, ema: bool = False
) -> VisionTransformer:
    """The encoder of a source, in eval mode; prints which of its weights were not used.

    Args:
        image_size: px, instead of its own; positions are interpolated.
        ema: use a run's averaged weights.

    Raises:
        FileNotFoundError, UserError: as `load_initial`; or the source does not say its number of
            heads, or has no averaged weights.
    """
    initial = _from_run(Path(source), ema=True) if ema else read_initial(source)
    try:
        sizes = encoder_sizes(initial.weights)
        size, patch_size = image_size or sizes.image_size, sizes.patch_size
        if initial.timm:
            model = timm_model(initial.timm, size, patch_size)
        else:
            model = ModelConfig(
                width=sizes.width,
                depth=sizes.depth,
                heads=_heads(initial, sizes.width, sizes.depth),
                image_size=size,
                patch_size=patch_size,
            )
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    encoder = model.encoder()
    # Don't report that the decoder is not used.
    weights = {name: each for name, each in initial.weights.items() if not is_decoder(name)}
    fit = _load(initial, encoder, lambda: load_encoder_weights(encoder, weights))
    if fit.resized or fit.missing or fit.left_out:
        print(f"{initial.source}\n{fit.describe()}", file=sys.stderr)
    return encoder.eval()


def _heads(initial: Initial, width: int, depth: int) -> int:
    known = {(each.width, each.depth): each.heads for each in MODELS.values()}
    heads = initial.heads or known.get((width, depth))
    if heads is None:
        raise UserError(
            f"{initial.source} does not say how many attention heads its width of {width} is "
            "split into; give a folder with its config.json"
        )
    return heads


def read_initial(source: str) -> Initial:
    """Read the weights of any source.

    Raises:
        FileNotFoundError: no such source.
        UserError: an unknown kind of file or model.
    """
    if source.startswith(TIMM):
        return _from_timm(source, source.removeprefix(TIMM))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; give {_KINDS}")
    if path.is_file():
        return _from_file(path)
    if checkpoint.latest(path):
        return _from_run(path)
    described = path / "config.json"
    config = json.loads(described.read_text()) if described.is_file() else {}
    if "architecture" in config:
        return _from_timm(source, f"local-dir:{path}")
    if "model_type" in config:
        return _from_transformers(path, config)
    raise UserError(
        f"{source} has neither a checkpoint-*.pt nor a config.json of timm or transformers; "
        f"give {_KINDS}"
    )


def _load(initial: Initial, encoder: VisionTransformer, load: Any) -> Fit:
    heads = encoder.blocks[0].attn.num_heads
    if initial.heads not in (None, heads):
        raise UserError(
            f"{initial.source}: its encoder has {initial.heads} attention heads, this model's has "
            f"{heads}"
        )
    try:
        return load()
    except ValueError as error:
        raise UserError(f"{initial.source}: {error}") from None


def _from_run(path: Path, *, ema: bool = False) -> Initial:
    model = checkpoint.load_model(path, ema=ema)
    weights = {name.removeprefix("encoder."): each for name, each in model.state_dict().items()}
    return Initial(str(path), weights, model.config.heads, model.config.timm)


def _from_file(path: Path) -> Initial:
    content = _read(path)
    if {"run", "step", "components"} <= content.keys():
        return _from_run(path)
    weights = _tensors(content)
    if any(name.endswith(_TRANSFORMERS) for name in weights):
        weights = from_transformers(weights)
    return Initial(str(path), weights, None)


def _from_timm(source: str, name: str) -> Initial:
    """timm looks for weights in its cache, then on the Hugging Face hub."""
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError, AssertionError) as error:
        raise UserError(f"{source}: timm can't load it: {reason(error)}") from error
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{source} is a {type(model).__name__}, not a plain vision transformer")
    weights = dict(model.state_dict())
    with torch.device("meta"):
        plain = dataclasses.replace(ModelConfig.of(model), timm="").encoder().state_dict()
    same = all(name in weights or name.startswith("norm.") for name in plain) and all(
        name in plain or name.startswith(("norm.", "fc_norm.", "head.")) for name in weights
    )
    heads = model.blocks[0].attn.num_heads
    return Initial(source, weights, heads, "" if same else model.pretrained_cfg["architecture"])


def _from_transformers(path: Path, config: Mapping[str, Any]) -> Initial:
    if config["model_type"] not in ("vit", "vit_mae") or config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{path} is a {config['model_type']} with {config.get('hidden_act', 'gelu')}; only vit "
            "and vit_mae with gelu fit"
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = [
            name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()
        ][:1]
    if not files:
        raise FileNotFoundError(f"{path} has neither model.safetensors nor pytorch_model.bin")
    weights = {name: value for file in files for name, value in _read(path / file).items()}
    return Initial(str(path), from_transformers(weights), config.get("num_attention_heads"))


def _read(path: Path) -> dict[str, Any]:
    """Content of a safetensors file, or of a dictionary saved by torch; {} for anything else."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # The MAE code saves its command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, LookupError, UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path} can't be read as weights: {reason(error)}") from error
    return content if isinstance(content, dict) else {}


def _tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file's content, without the wrappings of training scripts and compilers."""
    for key in ("model", "state_dict"):
        content = content.get(key, content)
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return clean_state_dict(weights)
