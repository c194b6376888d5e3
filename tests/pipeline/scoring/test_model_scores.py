import dataclasses

import numpy as np
import pytest
import torch

from famt.attention import attention_scores, cls_attention
from famt.frequency import token_frequency
from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.scores import MODEL_KINDS, ModelScoreSpec, encoder_digest
from famt.pipeline.scoring.model_scores import score_images


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder.eval()
    for block in encoder.blocks:  # away from the flat attention of a fresh model
        block.attn.qkv.weight.data *= 2
    return encoder


def _spec(encoder, kind="frequency_attention"):
    return ModelScoreSpec(kind, 8, 32, encoder_digest(encoder.state_dict()))


def _score(encoder, urls, scored, spec):
    maps = score_images(
        encoder, load_samples(urls, scored.cache), [spec],
        batch_size=4, threads=1, device=torch.device("cpu"),
    )  # fmt: skip
    return torch.from_numpy(maps[spec]).float()


def _by_hooks(encoder, images):
    """Plain attention of the last block and its output, caught by hooks on timm's own modules."""
    caught = {}
    block = encoder.blocks[-1]
    block.attn.fused_attn = False
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: caught.update(attn=out)),
        block.register_forward_hook(lambda _m, _i, out: caught.update(tokens=out[:, 1:])),
    ]
    with torch.no_grad():
        encoder(images)
    for hook in hooks:
        hook.remove()
    block.attn.fused_attn = True
    return caught["attn"], caught["tokens"]


def _expected(kind, attn, tokens):
    """By the functions that tests/famt compares with slow loops."""
    scores = {
        "attention": attention_scores(attn),
        "cls_attention": cls_attention(attn),
        "token_frequency": token_frequency(tokens),
        "frequency_attention": token_frequency(tokens) * attention_scores(attn),
    }[kind]
    return (scores / scores.mean(1, keepdim=True)).view(-1, 8, 8)


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_maps_equal_those_from_hooks_on_timms_blocks(scored, encoder, kind):
    spec = _spec(encoder, kind)
    scores = _score(encoder, scored.shards, scored, spec).split((10, 7, 9))
    for shard, maps in zip(scored.shards, scores, strict=True):
        images = _squashed(shard)[: len(maps)]  # DALI pads its batch
        expected = _expected(kind, *_by_hooks(encoder, images))
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=2e-3)


def _squashed(shard):
    """The shard's images through the very decoder and resize of the loader, in tar order."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=32, num_threads=1, device_id=None)
    def graph():
        encoded = fn.readers.webdataset(paths=[shard], ext=["jpg"], pad_last_batch=False)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return fn.resize(images, size=[32, 32], interp_type=types.INTERP_CUBIC, antialias=True)

    pipe = graph()
    pipe.build()
    images = torch.from_numpy(np.array(pipe.run()[0].as_array()))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


def test_an_encoder_without_a_number_in_it_is_refused(scored, encoder):
    encoder.norm.weight.data.fill_(1.0)
    encoder.blocks[0].mlp.fc1.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="must be finite"):
        _score(encoder, scored.shards, scored, _spec(encoder))


def test_an_unknown_kind_names_those_there_are(encoder):
    with pytest.raises(
        UserError, match="attention, cls_attention, token_frequency, frequency_attention"
    ):
        dataclasses.replace(_spec(encoder), kind="nonsense").describe()
