import dataclasses

import torch

from famt.pipeline.loading.masking import crop_scores
from famt.train.signals.config import FrequencyConfig


def test_a_cached_score_is_that_of_the_crops_own_window(begin):
    run = begin(frequency=FrequencyConfig("cached"))
    crops, maps = next(iter(run.loader)), run.context.cached()
    assert torch.equal(run.signals[0].read(crops, 0), crop_scores(maps, crops, 8))


def test_the_control_gives_every_image_the_map_of_another_always_the_same(begin):
    run = begin(frequency=FrequencyConfig("cached-of-others"))
    crops, maps = next(iter(run.loader)), run.context.cached()
    found = run.signals[0].read(crops, 0)
    used = set()
    for number, row in enumerate(crops.rows.tolist()):
        one = crops.take(torch.tensor([number]))
        fits = [
            other
            for other in range(len(maps))
            if torch.equal(
                crop_scores(maps, dataclasses.replace(one, rows=torch.tensor([other])), 8)[0],
                found[number],
            )
        ]
        assert len(fits) == 1
        assert fits[0] != row
        used |= set(fits)
    assert len(used) == len(crops.rows)
    assert torch.equal(run.signals[0].read(crops, 5), found)
