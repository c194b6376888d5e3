"""Exports a model to timm, to the MAE authors' code, or to Hugging Face transformers.

    famt export runs/first --to timm --out exported
    famt export runs/first --to hf --out exported-hf --ema

Writes a folder with weights and configuration as the library reads them, and prints the lines that
load it:

    timm    encoder (model.safetensors, config.json); of a fine-tuned run also the head
    mae     encoder and decoder, with the names of the published checkpoints (mae.pth); detection
            backbones such as ViTDet's read it too
    hf      encoder and decoder for ViTMAEModel, ViTMAEForPreTraining and ViTModel
            (model.safetensors, config.json, preprocessor_config.json)

Other libraries only know MAE's own decoder. From a model with the cross decoder, the encoder alone
is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.export import is_decoder, official_state, to_transformers
from famt.models import ModelConfig
from famt.patches import IMAGENET_MEAN, IMAGENET_STD
from famt.pipeline.errors import UserError
from famt.train import checkpoint
from famt.train.command_line import parsed, run_program
from famt.train.program_options import Export
from famt.train.run_folder import appearing


def main(args: Export) -> list[str]:
    """Write the folder; prints and returns the Python lines that load it.

    Raises:
        FileNotFoundError: no checkpoint.
        UserError: --out exists, or --ema of a run without averaged weights.
    """
    if args.out.exists():
        raise UserError(f"--out {args.out} exists already; give a new folder")
    if checkpoint.is_finetuned(args.checkpoint):
        if args.to != "timm":
            raise UserError(f"{args.checkpoint} is fine-tuned; export it --to timm, with its head")
        classifier = checkpoint.load_classifier(args.checkpoint, ema=args.ema)
        files, lines = _timm(classifier, ModelConfig.of(classifier), args.out)
        _finish(args, files, lines)
        return lines
    model = checkpoint.load_model(args.checkpoint, ema=args.ema)
    if model.config.timm and args.to != "timm":
        raise UserError(f"{model.config.timm} is an architecture of timm's; export it --to timm")
    left_out = ""
    if args.to == "timm":
        files, lines = _timm(model.encoder, model.config, args.out)
    else:
        reason = "only the encoder is averaged" if args.ema else ""
        if model.unofficial:
            reason = f"{args.to} has no {model.unofficial}"
        layout = _mae if args.to == "mae" else _transformers
        weights = model.encoder.state_dict() if reason else official_state(model)
        files, lines = layout(model.config, weights, args.out)
        if reason:
            names = dict.fromkeys(name.split(".")[0] for name in model.state_dict())
            left = ", ".join(name for name in names if name != "encoder")
            left_out = f"left out: everything but the encoder ({left}), because {reason}"
        elif model.config.low_pass is not None:
            left_out = f"left out: low-passed targets, which the loss in {args.to} does not have"
    _finish(args, files, lines, left_out)
    return lines


def _finish(args: Export, files: Mapping[str, Any], lines: list[str], left_out: str = "") -> None:
    """Write the folder, and print what loads it."""
    with appearing(args.out) as folder:
        folder.mkdir()
        for name, content in files.items():
            if name.endswith(".safetensors"):
                whole = {key: value.contiguous().clone() for key, value in content.items()}
                safetensors.torch.save_file(whole, folder / name, metadata={"format": "pt"})
            elif name.endswith(".pth"):
                torch.save(content, folder / name)
            else:
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.checkpoint}: written to {args.out}, {size / 1e6:.1f} MB")
    if left_out:
        print(left_out)
    print("To load it, either of:" if len(lines) > 1 else "To load it:", *lines, sep="\n    ")


def _timm(
    model: VisionTransformer, sizes: ModelConfig, out: Path
) -> tuple[dict[str, Any], list[str]]:
    name, arguments = timm_name(sizes)
    pool = model.global_pool or ("token" if model.has_class_token else "avg")
    if sizes.timm:
        arguments |= {"global_pool": pool, "fc_norm": "fc_norm.weight" in model.state_dict()}
    elif pool != "token":
        arguments["global_pool"] = pool
    classes, pixels = model.num_classes, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    config = {
        "architecture": name,
        "num_classes": classes,
        "num_features": sizes.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, sizes.image_size, sizes.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if sizes.image_size > 64 else 1.0,
            "crop_mode": "center",
            **pixels,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return {"model.safetensors": model.state_dict(), "config.json": config}, [
        f'timm.create_model("local-dir:{out}", pretrained=True)',
        f'timm.create_model("{name}", {_spelled({"num_classes": classes, **arguments})}, '
        f'checkpoint_path="{out}/model.safetensors", '
        f"pretrained_cfg_overlay={pixels})",
    ]


def timm_name(sizes: ModelConfig) -> tuple[str, dict[str, Any]]:
    """A timm model name, and the arguments that give it these sizes."""
    if sizes.timm:
        return sizes.timm, {"img_size": sizes.image_size, "patch_size": sizes.patch_size}
    for name in ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"):
        name += f"_patch{sizes.patch_size}_{sizes.image_size}"
        if timm.is_model(name):
            with torch.device("meta"):
                known = timm.create_model(name)
            heads = known.blocks[0].attn.num_heads
            if (known.embed_dim, len(known.blocks), heads) == (
                sizes.width, sizes.depth, sizes.heads,
            ):  # fmt: skip
                return name, {}
    return "vit_base_patch16_224", _sizes(sizes)


def _sizes(sizes: ModelConfig) -> dict[str, Any]:
    return {
        "img_size": sizes.image_size, "patch_size": sizes.patch_size,
        "embed_dim": sizes.width, "depth": sizes.depth, "num_heads": sizes.heads,
    }  # fmt: skip


def _mae(
    sizes: ModelConfig, weights: Mapping[str, Tensor], out: Path
) -> tuple[dict[str, Any], list[str]]:
    encoder = _sizes(sizes)
    decoder = {
        "decoder_embed_dim": sizes.decoder_width, "decoder_depth": sizes.decoder_depth,
        "decoder_num_heads": sizes.decoder_heads, "norm_pix_loss": sizes.normalise_targets,
    }  # fmt: skip
    calls = [("models_vit.VisionTransformer", {**encoder, "qkv_bias": True, "num_classes": 0})]
    if any(map(is_decoder, weights)):
        calls.append(("models_mae.MaskedAutoencoderViT", {**encoder, **decoder}))
    norm = "norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)"
    lines = [
        f"{name}({_spelled(arguments)}, {norm}).load_state_dict("
        f'torch.load("{out}/mae.pth")["model"], strict={name.startswith("models_mae")})'
        for name, arguments in calls
    ]
    return {"mae.pth": {"model": dict(weights)}}, lines


def _transformers(
    sizes: ModelConfig, weights: Mapping[str, Tensor], out: Path
) -> tuple[dict[str, Any], list[str]]:
    decoder = any(map(is_decoder, weights))
    config = {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "num_channels": 3,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": 4 * sizes.width,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "decoder_hidden_size": sizes.decoder_width,
        "decoder_num_hidden_layers": sizes.decoder_depth,
        "decoder_num_attention_heads": sizes.decoder_heads,
        "decoder_intermediate_size": 4 * sizes.decoder_width,
        "mask_ratio": 0.75,
        "norm_pix_loss": sizes.normalise_targets,
        "torch_dtype": "float32",
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": sizes.image_size, "width": sizes.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    classes = ["ViTMAEForPreTraining"] if decoder else []
    lines = [
        f'transformers.ViTModel.from_pretrained("{out}", add_pooling_layer=False)',
        f'transformers.ViTMAEModel.from_pretrained("{out}", mask_ratio=0.0)',
        *(f'transformers.{name}.from_pretrained("{out}")' for name in classes),
    ]
    return {
        "model.safetensors": to_transformers(weights),
        "config.json": config,
        "preprocessor_config.json": preprocessor,
    }, lines


def _spelled(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


if __name__ == "__main__":
    run_program(main, parsed(Export, __doc__))
