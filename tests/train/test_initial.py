"""`--init` from every kind of source."""

import argparse
import dataclasses
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import transformers
from launch import program_file
from samples import TINY

from famt.export import official_state
from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.train.initial import build_initial_encoder, load_initial


@pytest.fixture
def model():
    torch.manual_seed(1)
    return MaskedAutoencoder(TINY).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def _vit(heads=3):
    """A model of transformers in the sizes of `TINY`."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=96,
        image_size=32, patch_size=8, layer_norm_eps=1e-6,
    )  # fmt: skip
    return transformers.ViTModel(config)


def _same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def test_an_mae_checkpoint_with_its_command_line_beside_the_weights(model, tmp_path):
    """As main_pretrain.py writes it: optimiser, arguments and all."""
    content = {"model": official_state(model), "epoch": 799, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "checkpoint-799.pth")
    target = MaskedAutoencoder(TINY)
    assert not load_initial(target, str(tmp_path / "checkpoint-799.pth")).missing
    assert _same(target, model)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_bare_files_of_weights(model, tmp_path, wrapper):
    state = {wrapper + name: value for name, value in model.encoder.state_dict().items()}
    torch.save(state, tmp_path / "w.bin")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    for name in ("w.bin", "w.safetensors"):
        target = MaskedAutoencoder(TINY)
        load_initial(target, str(tmp_path / name))
        assert _same(target.encoder, model.encoder)


def test_a_folder_that_transformers_saved(model, images, tmp_path):
    theirs = _vit().eval()
    theirs.save_pretrained(tmp_path)
    fit = load_initial(model, str(tmp_path))
    assert fit.left_out == ["pooler.dense.bias", "pooler.dense.weight"]
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(
            model.encoder.forward_features(images), expected, rtol=0, atol=1e-5
        )


def test_a_folder_that_transformers_saved_in_parts(model, tmp_path):
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    fit = load_initial(model, str(tmp_path))
    assert len(fit.taken) == len(official_state(model))
    assert torch.equal(model.decoder_pred.weight, theirs.decoder.decoder_pred.weight)


def test_a_model_that_timm_has_by_name(tmp_path):
    """Its weights lie where timm and the hub's client keep what they have fetched."""
    name = "vit_tiny_patch16_224"
    torch.manual_seed(3)
    source = timm.create_model(name)
    repository = source.pretrained_cfg["hf_hub_id"]
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(
        source.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors"
    )
    command = [sys.executable, program_file("load_from_timm"), name, str(tmp_path / "loaded.pt")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "left out  head.weight, head.bias" in done.stdout
    loaded = torch.load(tmp_path / "loaded.pt")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.items())


def test_a_model_that_timm_cannot_load_is_an_error(model):
    with pytest.raises(UserError, match="timm:no_such_model: timm can't load it"):
        load_initial(model, "timm:no_such_model")
    with pytest.raises(UserError, match="timm can't load it"):
        load_initial(model, "timm:local-dir:/no/such/folder")


def test_errors_name_the_source_and_both_sizes(model, tmp_path):
    torch.save(model.encoder.state_dict(), tmp_path / "w.pth")
    wide = MaskedAutoencoder(dataclasses.replace(TINY, width=48))
    with pytest.raises(UserError, match=r"w\.pth: its encoder has width 24 and depth 2, and this"):
        load_initial(wide, str(tmp_path / "w.pth"))
    with pytest.raises(FileNotFoundError, match="give a run, an MAE checkpoint"):
        load_initial(model, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"neither a checkpoint-\*\.pt nor a config\.json"):
        load_initial(model, str(tmp_path))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth can't be read as weights"):
        load_initial(model, str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth: no ViT encoder"):
        load_initial(model, str(tmp_path / "list.pth"))


def test_another_number_of_heads_or_kind_of_model_is_refused(model, tmp_path):
    _vit(heads=2).save_pretrained(tmp_path / "heads")
    with pytest.raises(UserError, match="has 2 attention heads, this model's has 3"):
        load_initial(model, str(tmp_path / "heads"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert with gelu; only vit and"):
        load_initial(model, str(tmp_path / "other"))


def test_an_encoder_is_built_in_the_sizes_of_its_source(model, images, tmp_path):
    _vit().save_pretrained(tmp_path / "hf")
    encoder = build_initial_encoder(str(tmp_path / "hf"))
    assert encoder.patch_embed.img_size == (32, 32)
    assert encoder.blocks[0].attn.num_heads == 3
    larger = build_initial_encoder(str(tmp_path / "hf"), image_size=64)
    assert larger.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 65, 24)
    torch.save(model.encoder.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not say how many attention heads"):
        build_initial_encoder(str(tmp_path / "w.pth"))
    base = MODELS["vit_tiny"].encoder()
    torch.save(base.state_dict(), tmp_path / "tiny.pth")
    assert build_initial_encoder(str(tmp_path / "tiny.pth")).blocks[0].attn.num_heads == 3


def test_what_of_a_source_is_not_in_the_encoder_is_told(tmp_path, capsys):
    folder = tmp_path / "hf"
    _vit().save_pretrained(folder)
    capsys.readouterr()
    build_initial_encoder(str(folder), image_size=48)
    told = capsys.readouterr().err
    assert "resized   pos_embed (4 x 4 patches to 6 x 6)" in told
    assert "left out  pooler.dense.bias, pooler.dense.weight" in told
    torch.save(official_state(MaskedAutoencoder(MODELS["vit_nano"])), tmp_path / "nano.pth")
    build_initial_encoder(str(tmp_path / "nano.pth"))
    assert capsys.readouterr().err == ""


# The shapes that MAE's authors released: width, depth, patch size.
RELEASED = {"vit_base": (768, 12, 16), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 14)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_weights_of_every_released_shape_load(name, tmp_path):
    width, depth, patch = RELEASED[name]
    torch.manual_seed(4)
    weights = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + (224 // patch) ** 2, width),
        "patch_embed.proj.weight": torch.randn(width, 3, patch, patch),
        "patch_embed.proj.bias": torch.randn(width),
        **_blocks("blocks", width, depth),
        **_norm("norm", width),
        **_linear("decoder_embed", 512, width),
        "mask_token": torch.randn(1, 1, 512),
        "decoder_pos_embed": torch.randn(1, 1 + (224 // patch) ** 2, 512),
        **_blocks("decoder_blocks", 512, 8),
        **_norm("decoder_norm", 512),
        **_linear("decoder_pred", 3 * patch**2, 512),
    }
    torch.save({"model": weights}, tmp_path / f"{name}.pth")
    model = MaskedAutoencoder(MODELS[name])
    fit = load_initial(model, str(tmp_path / f"{name}.pth"))
    assert len(fit.taken) == len(weights)
    assert not fit.missing
    loaded = official_state(model)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def _norm(name, width):
    return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}


def _linear(name, out, into):
    return {f"{name}.weight": torch.randn(out, into), f"{name}.bias": torch.randn(out)}


def _blocks(stack, width, depth):
    weights = {}
    for block in (f"{stack}.{number}" for number in range(depth)):
        weights |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        weights |= _linear(f"{block}.attn.qkv", 3 * width, width)
        weights |= _linear(f"{block}.attn.proj", width, width)
        weights |= _linear(f"{block}.mlp.fc1", 4 * width, width)
        weights |= _linear(f"{block}.mlp.fc2", width, 4 * width)
    return weights
