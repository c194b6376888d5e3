"""Exported folders in the libraries that they are for, by the lines that the program prints."""

import functools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from PIL import Image
from runs import equal
from samples import photo
from timm.models.vision_transformer import Block, VisionTransformer

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.patches import gather_patches, normalise, normalise_images
from famt.pipeline.errors import UserError
from famt.sampling import PatchSplit
from famt.train import checkpoint
from famt.train.export import main, timm_name
from famt.train.initial import load_initial
from famt.train.program_options import Export


@pytest.fixture
def images():
    """Two photos of the model's size, `[2, 48, 48, 3]` uint8."""
    return torch.stack([torch.from_numpy(photo(n, 48, 48)) for n in range(2)])


def _export(run, to, out, *, ema=False):
    return main(Export(run, to, out, ema))


def _load(line):
    """Run a printed line as a user would, its imports made."""
    names = {"timm": timm, "transformers": transformers, "torch": torch, "functools": functools}
    return eval(line, names | {"models_mae": _PUBLISHED, "models_vit": _PUBLISHED})


def _features(model, images):
    with torch.no_grad():
        return model.encoder.forward_features(normalise_images(images))


@pytest.mark.parametrize("which", [0, 1])
def test_timm_gives_the_same_features(tiny_run, images, tmp_path, which):
    line = _export(tiny_run, "timm", tmp_path / "out")[which]
    theirs = _load(line).eval()
    ours = checkpoint.load_model(tiny_run)
    with torch.no_grad():
        features = theirs.forward_features(normalise_images(images))
    torch.testing.assert_close(features, _features(ours, images), rtol=0, atol=1e-5)
    assert tuple(theirs.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(theirs.pretrained_cfg["std"]) == (0.229, 0.224, 0.225)


def test_timm_knows_size_and_normalisation_and_takes_a_head_and_another_size(tiny_run, tmp_path):
    _export(tiny_run, "timm", tmp_path / "out")
    model = timm.create_model(
        f"local-dir:{tmp_path}/out", pretrained=True, num_classes=7, img_size=96
    )
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
    data = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    assert tuple(data["input_size"]) == (3, 48, 48)


def test_the_names_that_timm_has_are_used_where_the_sizes_are_theirs():
    names = {name: timm_name(sizes) for name, sizes in MODELS.items()}
    assert names["vit_tiny"] == ("vit_tiny_patch16_224", {})
    assert names["vit_small"] == ("vit_small_patch16_224", {})
    assert names["vit_base"] == ("vit_base_patch16_224", {})
    assert names["vit_large"] == ("vit_large_patch16_224", {})
    assert names["vit_huge"] == ("vit_huge_patch14_224", {})
    assert names["vit_nano"][1] == {
        "img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3
    }  # fmt: skip


def test_transformers_gives_the_same_features(tiny_run, images, tmp_path):
    vit, mae, _ = map(_load, _export(tiny_run, "hf", tmp_path / "out"))
    assert (type(vit).__name__, type(mae).__name__) == ("ViTModel", "ViTMAEModel")
    expected = _features(checkpoint.load_model(tiny_run), images)
    pixels = normalise_images(images)
    with torch.no_grad():
        tokens = vit.eval()(pixels).last_hidden_state
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        in_order = torch.arange(36.0).expand(2, -1)  # it would shuffle the patches
        tokens = mae.eval()(pixels, noise=in_order).last_hidden_state
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def test_transformers_gives_the_same_loss_and_reconstruction(tiny_run, images, tmp_path):
    theirs = _load(_export(tiny_run, "hf", tmp_path / "out")[2]).eval()
    ours = checkpoint.load_model(tiny_run)
    pixels, noise = normalise_images(images), torch.rand(2, 36)
    with torch.no_grad():
        output = theirs(pixels, noise=noise)
        order = noise.argsort(1)
        kept = math.floor(36 * 0.25)
        split = PatchSplit(masked=order[:, kept:], thrown=order[:, :0], visible=order[:, :kept])
        visible, masked = (
            normalise(gather_patches(images, index, 8)) for index in (split.visible, split.masked)
        )
        prediction = ours.decode(ours.encode(visible, split.visible), split)
        at = split.masked[..., None].expand(-1, -1, prediction.shape[-1])
        torch.testing.assert_close(output.logits.gather(1, at), prediction, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, ours(visible, masked, split)[0], rtol=0, atol=1e-5)


def test_transformers_prepares_an_image_as_training_did(tiny_run, images, tmp_path):
    _export(tiny_run, "hf", tmp_path / "out")
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(images[0].numpy())
    torch.testing.assert_close(
        prepare(picture, return_tensors="pt")["pixel_values"], normalise_images(images[:1])
    )


def test_the_published_classes_take_every_tensor(tiny_run, tmp_path):
    for line in _export(tiny_run, "mae", tmp_path / "out"):
        keys = _load(line)
        assert not keys.missing_keys
        decoder = [name for name in keys.unexpected_keys if not name.startswith("decoder_")]
        assert decoder in ([], ["mask_token"])


@pytest.mark.parametrize("to", ["timm", "mae", "hf", "run", "checkpoint"])
def test_what_went_out_comes_back_bit_for_bit(tiny_run, tmp_path, to):
    sources = {
        "run": tiny_run, "checkpoint": checkpoint.latest(tiny_run),
        "mae": tmp_path / "out" / "mae.pth",
    }  # fmt: skip
    if to in ("timm", "mae", "hf"):
        _export(tiny_run, to, tmp_path / "out")
    model = checkpoint.load_model(tiny_run)
    back = MaskedAutoencoder(model.config)
    fit = load_initial(back, str(sources.get(to, tmp_path / "out")))
    assert not fit.left_out
    assert not fit.resized
    if to == "timm":
        assert all(not name.startswith("blocks.") for name in fit.missing)
        model, back = model.encoder, back.encoder
    else:
        assert not fit.missing
    assert equal(model.state_dict(), back.state_dict())


@pytest.mark.parametrize("to", ["timm", "mae", "hf"])
def test_the_average_is_exported_on_request_and_without_a_decoder(tiny_run, tmp_path, to, capsys):
    _export(tiny_run, to, tmp_path / "out", ema=True)
    printed = capsys.readouterr().out
    assert ("left out: everything but the encoder (mask_token, " in printed) == (to != "timm")
    assert "ForPreTraining" not in printed
    assert "models_mae" not in printed
    average = checkpoint.load_model(tiny_run, ema=True)
    back = MaskedAutoencoder(average.config)
    load_initial(back, str(tmp_path / "out" / ("mae.pth" if to == "mae" else "")))
    raw = checkpoint.load_model(tiny_run).encoder.state_dict()
    assert not torch.equal(raw["cls_token"], average.encoder.cls_token)
    assert equal(average.encoder.state_dict(), back.encoder.state_dict())


@pytest.mark.parametrize("to", ["mae", "hf"])
def test_of_the_cross_decoder_it_says_that_it_stays_behind(tiny_cross, tmp_path, to, capsys):
    lines = _export(tiny_cross, to, tmp_path / "out")
    assert f"because {to} has no cross decoder" in capsys.readouterr().out
    assert not [line for line in lines if "ForPreTraining" in line or "models_mae" in line]
    _load(lines[0])


def test_a_folder_that_is_there_is_left_alone(tiny_run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already; give a new folder"):
        _export(tiny_run, "timm", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        _export(tmp_path / "none", "timm", tmp_path / "new")
    (tmp_path / "out" / "config.json").touch()
    with pytest.raises(UserError, match="out is an exported encoder; give the run"):
        _export(tmp_path / "out", "timm", tmp_path / "new")
    (tmp_path / "out" / "config.json").unlink()
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "new").exists()


class _PublishedMae(torch.nn.Module):
    """Parameters of the published class, by its argument names."""

    def __init__(
        self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
        decoder_num_heads, norm_layer, norm_pix_loss,
    ):  # fmt: skip
        super().__init__()
        cells = (img_size // patch_size) ** 2
        encoder = VisionTransformer(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            num_heads=num_heads, num_classes=0,
        )  # fmt: skip
        for name in ("cls_token", "pos_embed", "patch_embed", "blocks", "norm"):
            setattr(self, name, getattr(encoder, name))
        self.decoder_embed = torch.nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = torch.nn.Parameter(torch.zeros(1, cells + 1, decoder_embed_dim))
        self.decoder_blocks = torch.nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = torch.nn.Linear(decoder_embed_dim, patch_size**2 * 3)


_PUBLISHED = SimpleNamespace(
    VisionTransformer=VisionTransformer, MaskedAutoencoderViT=_PublishedMae
)


def test_the_users_script_of_the_documents_runs(tiny_run, tmp_path):
    _export(tiny_run, "timm", tmp_path / "out")
    photos = [str(tmp_path / f"{n}.jpg") for n in range(2)]
    for n, path in enumerate(photos):
        Image.fromarray(photo(n)).save(path)
    script = Path(__file__).parents[2] / "docs" / "examples" / "use_encoder.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out"), photos[0], photos[1], photos[0]],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    similarity = [float(each) for each in re.findall(r"-?\d+\.\d+", done.stdout)]
    assert similarity[0] == similarity[2] == pytest.approx(1, abs=1e-3)
    assert similarity[1] < 1
