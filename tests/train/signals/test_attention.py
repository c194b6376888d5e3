import dataclasses

import torch
from samples import RANKS, Rows, context

from famt.attention import attention_scores, last_attention, last_block
from famt.frequency import token_frequency
from famt.geometry import crop_maps
from famt.patches import normalise_images
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropBatch, CropLoader
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


def test_each_step_looks_at_the_share_that_was_unseen_longest(encoder, scored):
    rolling = _rolling(encoder, 26, 4)
    loader = _loader(scored, RandomView())
    step, batches = 0, []
    for _ in range(6):
        for crops in loader:
            before = rolling.bank.written_at.clone()
            rolling.read(crops, step)
            rolling.synchronise()
            changed = (rolling.bank.written_at != before).nonzero().flatten()
            assert len(changed) == -(-len(crops.rows) // 4)
            oldest = before[crops.rows].sort().values[: len(changed)]
            assert torch.equal(before[changed].sort().values, oldest)
            step += 1
            batches.append(len(changed))
    assert rolling.bank.coverage == 1.0


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


def test_after_a_sweep_over_crops_the_same_crops_read_what_was_seen_of_them(encoder, scored):
    crops = next(iter(_loader(scored, RandomView(area=(0.3, 1.0)))))
    rolling = _rolling(encoder, 26, 1)
    rolling.read(crops, 0)
    rolling.synchronise()
    live = _live(encoder).read(crops, 0)
    read = _relative(rolling.bank.read(crops, 8))
    # There and back, each crop cell becomes a mean over the image cells that it touches.
    blurred = torch.ones(8, 8, 8)
    for n in range(8):
        cells = torch.eye(64).view(64, 8, 8)
        window, flip = crops.windows[n].expand(64, 4), crops.flips[n].expand(64)
        reads = crop_maps(cells, window, flip, 8).flatten(1)  # image cell -> crop cells
        height, width = crops.windows[n, 2:]
        share = reads * height * width  # area that an image cell and a crop cell share
        outside = 1 - share.sum(1)
        image = share @ _relative(live)[n] + outside
        blurred[n] = (image @ reads).view(8, 8)
    torch.testing.assert_close(read, _relative(blurred.flatten(1)), atol=3e-3, rtol=3e-3)


def test_views_of_one_row_are_read_apart(encoder):
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    whole, none = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([False])
    rolling = _rolling(encoder, 2, 1)
    crops = CropBatch(images, torch.tensor([0, 1]), whole.expand(2, 4), none.expand(2))
    rolling.read(crops, 0)
    rolling.synchronise()
    mirrored = dataclasses.replace(crops, flips=torch.tensor([True, True]))
    plain = rolling.bank.read(crops, 8).view(2, 8, 8)
    turned = rolling.bank.read(mirrored, 8).view(2, 8, 8)
    torch.testing.assert_close(turned, plain.flip(-1))
