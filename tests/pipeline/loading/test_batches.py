import dataclasses

import pytest
import torch

from famt.models import ModelConfig, PatchConfig
from famt.patches import patchify
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.loading.batches import famt_loader
from famt.pipeline.options import JoinConfig, LoaderConfig
from famt.pipeline.scores import ModelScoreSpec
from famt.pipeline.scoring.generation import GenerationError, generation_path, write_generation

PATCHES = PatchConfig(image_size=56, patch_size=8)
LOADER = LoaderConfig(batch_size=8, shuffle_buffer=16, threads=1)


def _batches(scored, **options):
    options = {"patches": PATCHES, "loader": LOADER, "spec": scored.spec} | options
    return list(famt_loader(scored.shards, scored.cache.url, **options))


def test_batches_hold_crops_weights_split_pixels_and_labels(scored):
    batches = _batches(scored, epochs=2)
    assert len(batches) == 6
    for batch in batches:
        assert batch.images.shape == (8, 56, 56, 3)
        assert batch.weights.shape == (8, 49)
        assert (batch.labels == batch.patches.views.rows % 3).all()
        split, pixels = batch.patches.split, patchify(batch.images, 8)
        assert [each.shape[1] for each in (split.masked, split.thrown, split.visible)] == [
            22, 19, 8
        ]  # fmt: skip
        for b in range(8):
            assert torch.equal(batch.patches.visible[b], pixels[b, split.visible[b]])
            assert torch.equal(batch.patches.masked[b], pixels[b, split.masked[b]])
        assert batch.patches.visible.dtype == torch.uint8


def test_weights_are_the_scores_to_their_power_times_the_attention(scored):
    def attention(images):
        return images.float().mean((1, 2, 3))[:, None] * torch.arange(1, 50)

    (plain, *_), (both, *_) = _batches(scored), _batches(scored, attention=attention)
    factor = torch.arange(1, 50) / 25
    torch.testing.assert_close(both.weights, plain.weights * factor)
    power = _batches(scored, frequency_exponent=1.0)[0].weights
    torch.testing.assert_close(plain.weights**4, power)


def test_equal_seeds_give_equal_batches_and_ranks_others(scored):
    first, again, other = _batches(scored), _batches(scored), _batches(scored, seed=1)
    assert torch.equal(first[0].patches.split.masked, again[0].patches.split.masked)
    assert not torch.equal(first[0].images, other[0].images)
    shares = [_batches(scored, rank=rank, world_size=2) for rank in range(2)]
    rows = [torch.cat([each.patches.views.rows for each in share]).tolist() for share in shares]
    assert len(rows[0]) == len(rows[1])
    assert not set(rows[0]) & set(rows[1])


def test_images_that_are_held_decoded_give_the_same_crops(scored):
    read, held = (
        _batches(scored, loader=dataclasses.replace(LOADER, resident=resident))[0]
        for resident in (False, True)
    )
    assert torch.equal(read.patches.views.windows, held.patches.views.windows)
    assert (read.images.float() - held.images.float()).abs().mean() < 4


def test_the_blend_rises_over_all_epochs(scored):
    heavy = torch.zeros(8, 49)
    heavy[:, :22] = 1.0
    batches = _batches(
        scored, frequency_exponent=0.0, attention=lambda images: heavy, epochs=4,
        join=JoinConfig(blend=(0.0, 1.0)),
    )  # fmt: skip
    shares = [heavy.gather(1, each.patches.split.masked).mean().item() for each in batches]
    assert shares[0] == pytest.approx(22 / 49, abs=0.12)
    assert shares[0] < shares[5] < shares[11]


def test_without_a_score_nothing_has_to_be_scored(scored, tmp_path):
    options = {"patches": PATCHES, "loader": LOADER}
    fresh = str(tmp_path / "fresh")
    (batch, *_) = famt_loader(scored.shards, fresh, frequency_exponent=0.0, **options)
    assert (batch.weights == 1).all()
    ScoreCache(str(tmp_path / "empty"), create=True)
    with pytest.raises(CacheError, match="famt score"):
        next(famt_loader(scored.shards, str(tmp_path / "empty"), **options))


def test_a_model_in_training_is_looked_at_in_turns(scored):
    """Each image is looked at once before any is twice, and what was seen is remembered."""
    encoder = ModelConfig(image_size=56, patch_size=8, width=24, depth=2, heads=3).encoder()
    batches = _batches(scored, frequency_exponent=0.0, encoder=encoder, epochs=8)
    seen = [(each.weights != 1).any(1) for each in batches]
    assert [int(each.sum()) for each in seen[:3]] == [1, 1, 1]
    rows = torch.cat(
        [each.patches.views.rows[mask] for each, mask in zip(batches, seen, strict=True)]
    )
    assert len(rows.unique()) > 20
    ahead = torch.stack([each.float().mean() for each in seen])
    assert ahead[-3:].min() > 0.7


def test_the_newest_generation_weighs_each_epoch_or_the_one_that_is_named(scored, table, tmp_path):
    for step in (3, 7):
        _write(tmp_path, table, step)
    sources = (tmp_path, generation_path(tmp_path, 3))
    newest, older = (_batches(scored, refreshed=each)[0].weights for each in sources)
    first = newest / newest.mean(1, keepdim=True)
    assert not torch.allclose(newest, older)
    assert torch.isfinite(first).all()
    with pytest.raises(GenerationError, match=r"generation-00000005\.zip: no such generation"):
        _batches(scored, refreshed=generation_path(tmp_path, 5))


def _write(folder, table, step):
    """A generation of maps that grow along the raster, the steeper the later."""
    spec = ModelScoreSpec("token_frequency", 7, 56, f"encoder-{step}")
    slope = 1 + torch.arange(49.0).view(7, 7) * step / 49
    maps = (slope / slope.mean()).half().expand(len(table), 7, 7)
    write_generation(generation_path(folder, step), "run-a", table.digest, {spec: maps.numpy()})
