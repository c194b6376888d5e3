"""Architectures of timm's: trained on a part of the patches, and the same encoder in timm after."""

import dataclasses

import pytest
import timm
import torch
from samples import photo

from famt.methods import METHODS
from famt.models import timm_model
from famt.patches import normalise, normalise_images, patchify
from famt.pipeline.errors import UserError
from famt.pipeline.options import JoinConfig
from famt.sampling import PatchSplit
from famt.train import checkpoint
from famt.train.config import Pretrain
from famt.train.embed import main as embed
from famt.train.evaluate.evaluators.finetune import Finetune
from famt.train.evaluate.run import run as evaluate
from famt.train.export import main as export
from famt.train.initial import build_initial_encoder, load_initial
from famt.train.program_options import Embed, Export
from famt.train.signals.config import AttentionConfig, FrequencyConfig

REGISTERS = "vit_small_patch14_reg4_dinov2"  # scaled layers; registers and class without positions
NO_CLASS = "vit_medium_patch16_gap_240"
BEFORE = "vit_xsmall_patch16_clip_224"  # a norm before the blocks, no bias in the projection


def _images(size):
    return torch.stack([torch.from_numpy(photo(n, size, size)) for n in range(2)])


def _small(name, size, **options):
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    return dataclasses.replace(timm_model(name, size), **small, **options)


@pytest.mark.parametrize("method", ["mae", "simmim"])
@pytest.mark.parametrize(
    ("name", "size", "prefix"), [(REGISTERS, 56, 5), (NO_CLASS, 48, 0), (BEFORE, 48, 1)]
)
def test_all_patches_give_what_timm_computes_of_the_image(name, size, prefix, method):
    config = _small(name, size)
    model = METHODS[method](config).eval()
    images = _images(size)
    patches = normalise(patchify(images, config.patch_size))
    order = torch.randperm(patches.shape[1]).expand(2, -1)
    with torch.no_grad():
        expected = model.encoder.forward_features(normalise_images(images))
        found = model.encode(patches[:, order[0]], order)
    assert found.shape == (2, prefix + patches.shape[1], config.width)
    torch.testing.assert_close(found[:, :prefix], expected[:, :prefix], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found[:, prefix:], expected[:, prefix:][:, order[0]], rtol=0, atol=1e-5
    )
    split = PatchSplit(masked=order[:, :4], thrown=order[:, 4:6], visible=order[:, 6:])
    loss, of_patches = model(patches[:, order[0, 6:]], patches[:, order[0, :4]], split)
    assert loss.isfinite()
    assert of_patches.shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "it is a SwinTransformer"),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", "its HybridEmbed lets patches overlap"),
        ("vit_pwee_patch16_reg1_gap_256", "its blocks are ParallelScalingBlocks"),
        ("no_such_model", "timm can't build it: Unknown model"),
    ],
)
def test_an_architecture_that_can_not_be_is_refused_with_the_reason(name, reason):
    with pytest.raises(UserError, match=f"--model timm:{name}.*{reason}"):
        Pretrain(shards=[], cache="", out="", model=f"timm:{name}")


def test_a_mistyped_name_lists_those_that_are_known():
    with pytest.raises(UserError, match=r"--model vit_bse: give vit_nano, .*, or timm:<name>"):
        Pretrain(shards=[], cache="", out="", model="vit_bse")


@pytest.fixture
def trained(train):
    """One epoch of an architecture of timm's; gives the folder of the run."""
    return lambda name, size, **options: train(
        model=f"timm:{name}", image_size=size, decoder_width=32, decoder_depth=1, decoder_heads=2,
        epochs=1, join=JoinConfig(mask_ratio=0.5, throw_ratio=0.25), **options,
    )  # fmt: skip


def test_registers_and_scaled_layers_are_trained_and_go_back_to_timm(
    trained, scored, tmp_path, capsys
):
    run = trained(
        REGISTERS, 56, frequency=FrequencyConfig("cached"), attention=AttentionConfig("rolling")
    )
    ours = checkpoint.load_model(run).encoder
    assert not torch.equal(ours.reg_token, timm_model(REGISTERS, 56).encoder().reg_token)
    lines = export(Export(run, "timm", tmp_path / "out"))
    pixels = normalise_images(_images(56))
    with torch.no_grad():
        features = ours.forward_features(pixels)
        for line in lines:
            theirs = eval(line, {"timm": timm}).eval()
            found = theirs.forward_features(pixels)
            torch.testing.assert_close(found, features, rtol=0, atol=1e-5)
            torch.testing.assert_close(theirs(pixels), features[:, 0], rtol=0, atol=1e-5)
    for source in (run, tmp_path / "out"):
        back = build_initial_encoder(str(source)).state_dict()
        assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())
    again = METHODS["mae"](_small(REGISTERS, 84))
    fit = load_initial(again, str(tmp_path / "out"))
    assert fit.resized == {"pos_embed": "4 x 4 patches to 6 x 6"}
    for to in ("mae", "hf"):
        with pytest.raises(UserError, match="export it --to timm"):
            export(Export(run, to, tmp_path / to))
    tuned = evaluate(
        Finetune(
            checkpoint=str(run), cache=scored.cache.url, train=scored.shards[:2],
            val=scored.shards[2:], out=tmp_path / "tuned", epochs=1, batch_size=8, device="cpu",
            threads=1,
        )
    )  # fmt: skip
    assert 0 <= tuned["top1"] <= 1


def test_without_a_class_token_the_mean_goes_out_and_attention_is_refused(
    trained, scored, tmp_path
):
    off = {"frequency": FrequencyConfig("off"), "attention": AttentionConfig("off")}
    with pytest.raises(UserError, match="need its class token"):
        trained(NO_CLASS, 48, **off | {"attention": AttentionConfig("live")})
    run = trained(NO_CLASS, 48, **off)
    (line, _) = export(Export(run, "timm", tmp_path / "out"))
    pixels = normalise_images(_images(48))
    with torch.no_grad():
        features = checkpoint.load_model(run).encoder.forward_features(pixels)
        found = eval(line, {"timm": timm}).eval()(pixels)
    torch.testing.assert_close(found, features.mean(1), rtol=0, atol=1e-5)
    embed(
        Embed(
            checkpoint=str(run), cache=scored.cache.url, shards=scored.shards, out=tmp_path / "f",
            device="cpu", threads=1,
        )
    )  # fmt: skip
