import torch
from samples import RANKS, Rows, context

from famt.attention import attention_scores, last_attention, last_block
from famt.frequency import token_frequency
from famt.patches import normalise_images
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig, RandomView, WholeView
from famt.train.signals.attention import Live, Rolling
from famt.train.signals.config import AttentionConfig


def _loader(scored, view, batch_size=8):
    table = load_samples(scored.shards, scored.cache)
    config = LoaderConfig(batch_size, image_size=32, view=view, shuffle_buffer=8, threads=1)
    return CropLoader(table, config, drop_last=False)


def _relative(scores):
    return scores / scores.mean(1, keepdim=True)


def _live(encoder, kind="attention", **options):
    return Live(AttentionConfig(kind=kind), context(encoder, Rows(26), RANKS, **options))


def _rolling(encoder, rows, every, **options):
    slot = AttentionConfig(every=every, **({"image_size": 32} | options))
    return Rolling(slot, context(encoder, Rows(rows), RANKS))


def test_live_scores_are_those_of_the_last_attention(encoder, scored):
    crops = next(iter(_loader(scored, RandomView())))
    expected = attention_scores(last_attention(encoder, normalise_images(crops.images)))
    torch.testing.assert_close(_live(encoder).read(crops, 0), expected)
    in_parts = _live(encoder, parts=4).read(crops, 0)
    torch.testing.assert_close(in_parts, expected)


def test_any_score_of_a_model_can_be_live(encoder, scored):
    crops = next(iter(_loader(scored, RandomView())))
    tokens = last_block(encoder, normalise_images(crops.images))[1]
    found = _live(encoder, "token_frequency").read(crops, 0)
    torch.testing.assert_close(found, token_frequency(tokens))


def test_smaller_crops_give_a_map_of_the_same_patches(encoder, scored):
    crops = next(iter(_loader(scored, WholeView())))
    rolling = _rolling(encoder, 26, 1, kind="cls_attention", image_size=None)
    assert "at 16 px" in rolling.describe()
    assert rolling.read(crops, 0).shape == (8, 64)


def test_after_a_sweep_over_whole_images_rolling_gives_what_live_gives(encoder, scored):
    rolling = _rolling(encoder, 26, 4)
    loader = _loader(scored, WholeView())
    for step in range(6):
        for crops in loader:
            rolling.read(crops, step)
    rolling.synchronise()
    for crops in loader:
        read = rolling.bank.read(crops, 8)
        live = _live(encoder).read(crops, 0)
        torch.testing.assert_close(read, _relative(live), atol=2e-3, rtol=2e-3)
