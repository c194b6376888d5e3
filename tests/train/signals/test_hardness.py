import pytest
import torch
from runs import written_by_a_step

from famt.patches import normalise
from famt.pipeline.options import JoinConfig
from famt.train.signals.config import AttentionConfig, FrequencyConfig, HardnessConfig


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_step_writes_the_ranks_of_its_errors_at_the_cells_of_the_masked_patches(begin, share):
    run = begin(
        frequency=FrequencyConfig("off"),
        attention=AttentionConfig("off"),
        hardness=HardnessConfig("errors"),
        join=JoinConfig(predicted_share=share),
        accumulate=2,
    )
    batch, scores, known = written_by_a_step(run)
    with torch.no_grad():
        predicted = run.model.predict(normalise(batch.visible), batch.split)
    for b in range(8):
        errors = {}
        for place, patch in enumerate(batch.split.predicted[b].tolist()):
            pixels = normalise(batch.masked[b, place])
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors[patch] = sum(((predicted[b, place] - target) ** 2).tolist()) / len(target)
        assert known[b].nonzero().flatten().tolist() == sorted(errors)
        easiest_first = sorted(errors, key=errors.get)
        assert len(easiest_first) == int(28 * share)
        for rank, patch in enumerate(easiest_first, start=1):
            assert scores[b, patch].item() == pytest.approx(rank / len(errors))
