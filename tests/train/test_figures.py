import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.loading.masking import crop_scores
from famt.pipeline.options import JoinConfig, LoaderConfig, RandomView
from famt.train import checkpoint, picture
from famt.train.config import Pretrain
from famt.train.figures import main
from famt.train.program_options import Figures
from famt.train.signals.config import AttentionConfig, FrequencyConfig, HardnessConfig

VIEW = RandomView(area=(0.6, 1.0))
OFF = AttentionConfig("off")


@pytest.fixture
def drawn(monkeypatch):
    """The columns of the last picture that was drawn, by their titles."""
    columns = {}

    def draw(given):
        columns.clear()
        columns.update(given)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(picture, "draw", draw)
    return columns


def _figures(config, scored):
    return Figures(
        checkpoint=config.out, cache=scored.cache.url, shards=scored.shards,
        out=config.out / "picture.png", images=3, view=VIEW,
    )  # fmt: skip


def _crops(scored):
    """Those that the picture is of."""
    table = load_samples(scored.shards, scored.cache)
    options = LoaderConfig(3, image_size=32, view=VIEW, threads=1)
    return next(iter(CropLoader(table, options, drop_last=True)))


def _maps(scored):
    return load_maps(load_samples(scored.shards, scored.cache), scored.cache, scored.spec)


def _same(shown, expected):
    np.testing.assert_allclose(shown, expected.view(-1, 8, 8), rtol=1e-5)


def test_a_picture_has_a_row_an_image_and_a_column_a_stage(config, train, scored):
    train(epochs=1)
    new = config.out / "new" / "picture.png"
    out = main(dataclasses.replace(_figures(config, scored), out=new))
    drawing = np.array(Image.open(out).convert("RGB"))
    height, width, _ = drawing.shape
    assert 1.7 < width / height < 2.1  # 6 columns by 3 rows
    cells = [part for row in np.array_split(drawing[40:], 3) for part in np.array_split(
        row, 6, axis=1)]  # fmt: skip
    assert all(cell.std() > 1 for cell in cells)  # nothing is left blank


def test_a_refreshed_signal_without_a_generation_is_drawn_as_the_plain_run_it_is(
    config, train, scored, drawn
):
    train(epochs=1, frequency=FrequencyConfig("refreshed"), attention=OFF)
    main(_figures(config, scored))
    assert drawn.keys() == {"crop", "split", "reconstruction"}
    dark = (drawn["split"] != drawn["crop"]).any(-1)  # masked: three quarters, as MAE's
    assert dark.mean() == pytest.approx(0.75, abs=0.02)


def test_a_cached_score_is_drawn_until_there_is_a_generation_then_the_encoders(
    config, train, scored, drawn
):
    train(epochs=1, frequency=FrequencyConfig("cached-then-refreshed"), attention=OFF)
    main(_figures(config, scored))
    _same(drawn["frequency"], crop_scores(_maps(scored), _crops(scored), 8))
    state = checkpoint.load(config.out)
    state.components["frequency"]["generation"] = 3
    checkpoint.save(config.out, state, keep=1)
    before = drawn["frequency"]
    main(_figures(config, scored))
    assert not np.allclose(drawn["frequency"], before)


def test_the_runs_own_images_are_drawn_by_what_its_banks_hold(config, train, scored, drawn):
    signals = {"attention": AttentionConfig("rolling"), "hardness": HardnessConfig("errors")}
    train(epochs=2, frequency=FrequencyConfig("off"), **signals)
    main(_figures(config, scored))
    crops = _crops(scored)
    for name in signals:
        maps = checkpoint.load(config.out).components[name]["maps"]
        _same(drawn[name], crop_scores(maps, crops, 8))
    others = dataclasses.replace(_figures(config, scored), shards=scored.shards[:1])
    main(others)
    _same(drawn["hardness"], torch.ones(3, 64))


def test_weights_are_blended_as_at_that_step(config, train, scored, drawn):
    train(
        epochs=2,
        frequency=FrequencyConfig("cached", cached_exponent=1.0),
        attention=OFF,
        join=JoinConfig(blend=(0.0, 1.0)),
        checkpoint_minutes=0.0,
        keep_checkpoints=9,
    )
    scores = crop_scores(_maps(scored), _crops(scored), 8)
    relative = scores / scores.mean(1, keepdim=True)
    for step, blend in ((1, 1 / 6), (3, 0.5), (6, 1.0)):
        path = config.out / f"checkpoint-{step:08d}.pt"
        main(dataclasses.replace(_figures(config, scored), checkpoint=path))
        expected = (1 - blend) + blend * relative
        _same(drawn["weights"] / drawn["weights"].mean((1, 2), keepdims=True), expected)


def test_a_runs_own_picture_is_drawn_by_the_weights_of_its_step(begin, drawn):
    join = JoinConfig(blend=(0.0, 1.0))
    run = begin(frequency=FrequencyConfig("cached"), attention=OFF, join=join)
    run.picture(next(iter(run.loader)), 0)
    _same(drawn["weights"], torch.ones(8, 64))


def test_options_come_back_from_what_a_checkpoint_keeps_of_them(config):
    config = dataclasses.replace(config, fused=(0, 1), stage=config.out / "disk")
    assert Pretrain.from_description({**config.describe(), "data": "x"}) == config.absolute()
