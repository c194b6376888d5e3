import pytest
import torch
from runs import written_by_a_step

from famt.patches import normalise
from famt.pipeline.errors import UserError
from famt.pipeline.options import JoinConfig
from famt.train.signals.config import AttentionConfig, FrequencyConfig

SEEN = {"frequency": FrequencyConfig("off"), "attention": AttentionConfig("seen")}


@pytest.fixture
def run(begin):
    run = begin(**SEEN, accumulate=2)
    for block in run.model.encoder.blocks:  # away from the flat attention of a fresh model
        block.attn.qkv.weight.data *= 3
    return run


def _attention(run, batch):
    """Softmax attention of the last block in this very pass, from a hook on timm's own module."""
    block, caught = run.model.encoder.blocks[-1], []
    block.attn.fused_attn = False
    hook = block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: caught.append(out))
    with torch.no_grad():
        run.model.encode(normalise(batch.visible), batch.split.visible)
    hook.remove()
    block.attn.fused_attn = True
    return caught[0]


def test_a_step_writes_what_it_attends_to_at_the_cells_of_the_visible_patches(run):
    batch, scores, known = written_by_a_step(run)
    attention = _attention(run, batch)
    for b in range(8):
        visible = batch.split.visible[b].tolist()
        assert known[b].nonzero().flatten().tolist() == sorted(visible)
        for place, patch in enumerate(visible, start=1):
            expected = 0.0
            for head in attention[b]:
                cls = head[0, place] * head[1:, 0].mean()
                expected += (cls + head[1:, place].mean() * head[0, 0]) / len(attention[b])
            assert scores[b, patch].item() == pytest.approx(float(expected), rel=1e-3)


def test_weights_come_from_what_was_seen_and_gradients_are_left_alone(run):
    crops = next(iter(run.loader))
    with torch.random.fork_rng():
        before = run.prepare(crops, 0)
    run.forward_backward(before)
    gradient = run.model.encoder.blocks[-1].attn.qkv.weight.grad.clone()
    (signal,) = run.signals
    weights = signal.read(crops, 1)
    known = torch.zeros(8, 64).scatter(1, before.split.visible, 1.0).bool()
    assert weights[known].std() > 0.01
    assert signal.bank.coverage == pytest.approx(8 / 26)
    signal.close(finished=True)
    run.optimisation.optimizer.zero_grad()
    run.signals = []
    run.forward_backward(before)
    assert torch.equal(run.model.encoder.blocks[-1].attn.qkv.weight.grad, gradient)


def test_a_method_whose_encoder_sees_more_is_refused(begin):
    run = begin(**SEEN, method="simmim", join=JoinConfig(mask_ratio=0.6, throw_ratio=0.0))
    batch = run.prepare(next(iter(run.loader)), 0)
    with pytest.raises(UserError, match=r"--attention\.source seen: .* use rolling"):
        run.forward_backward(batch)


def test_scores_that_need_all_patches_are_refused(begin):
    with pytest.raises(UserError, match=r"--attention\.kind token_frequency"):
        begin(attention=AttentionConfig("seen", kind="token_frequency"))
