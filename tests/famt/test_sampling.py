import itertools
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.sampling import patch_counts, patch_weights, sample_patches


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _sequence_probability(weights, sequence):
    """Chance of drawing exactly this sequence, one patch at a time by weight."""
    left, probability = sum(weights), 1.0
    for index in sequence:
        probability *= weights[index] / left
        left -= weights[index]
    return probability


def test_masked_and_thrown_follow_exact_inclusion_probabilities():
    weights, draws = [1.0, 2.0, 3.0, 6.0, 0.5], 40_000
    split = sample_patches(torch.tensor([weights]).expand(draws, -1), 0.4, 0.4, _generator())
    masked, thrown = [0.0] * 5, [0.0] * 5
    for sequence in itertools.permutations(range(5), 4):
        probability = _sequence_probability(weights, sequence)
        for index in sequence[:2]:
            masked[index] += probability
        for index in sequence[2:]:
            thrown[index] += probability
    for group, expected in ((split.masked, masked), (split.thrown, thrown)):
        counts = torch.bincount(group.flatten(), minlength=5).double() / draws
        deviation = torch.tensor(expected).double()
        error = (deviation * (1 - deviation) / draws).sqrt()
        assert ((counts - deviation).abs() < 5 * error).all()


def test_the_order_of_draws_agrees_with_torch_multinomial():
    weights, draws = torch.tensor([0.2, 1.0, 3.0, 0.7]), 30_000
    ours = sample_patches(weights.expand(draws, -1), 0.5, 0.25, _generator(1))
    drawn = torch.cat([ours.masked, ours.thrown], 1)
    theirs = torch.multinomial(weights.expand(draws, -1), 3, generator=_generator(2))
    code = torch.tensor([16, 4, 1])
    table = torch.stack([torch.bincount((x * code).sum(1), minlength=64) for x in (drawn, theirs)])
    table = table[:, table.sum(0) > 0]
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-4


@settings(deadline=None)
@given(st.integers(2, 200), st.floats(0.05, 0.9), st.floats(0, 0.9), st.integers(0, 999))
def test_the_split_is_a_partition(patches, mask, throw, seed):
    throw = min(throw, 0.95 - mask)
    if throw < 0 or int(patches * mask) < 1:
        return
    weights = torch.rand(3, patches, generator=_generator(seed))
    split = sample_patches(weights, mask, throw, _generator(seed))
    together = torch.cat([split.masked, split.thrown, split.visible], 1)
    assert together.dtype == torch.int64
    assert (together.sort(1).values == torch.arange(patches)).all()
    counts = (split.masked.shape[1], split.thrown.shape[1], split.visible.shape[1])
    assert counts == patch_counts(patches, mask, throw)


def test_counts_are_those_of_the_published_code():
    assert patch_counts(196, 0.45, 0.40) == (88, 78, 30)
    assert patch_counts(196, 0.75, 0.0) == (147, 0, 49)
    assert patch_counts(49, 0.44, 0.26) == (21, 13, 15)


def test_zero_weights_come_last_and_evenly():
    weights = torch.tensor([0.0, 1.0, 0.0, 1e-30, 0.0]).expand(6000, -1)
    split = sample_patches(weights, 0.4, 0.2, _generator())
    assert (split.masked.sort(1).values == torch.tensor([1, 3])).all()
    counts = torch.bincount(split.thrown.flatten(), minlength=5)
    assert (counts[[0, 2, 4]] - 2000).abs().max() < 200


def test_one_hot_weights_always_mask_that_patch():
    weights = torch.zeros(500, 9)
    weights[:, 4] = 1
    assert (sample_patches(weights, 0.12, 0.5, _generator()).masked == 4).all()


def test_infinite_weights_come_first_and_evenly():
    weights = torch.tensor([1.0, math.inf, 1e300, math.inf], dtype=torch.float64).expand(4000, -1)
    masked = sample_patches(weights, 0.25, 0.25, _generator()).masked
    assert set(masked.flatten().tolist()) == {1, 3}
    assert abs((masked == 1).sum().item() - 2000) < 200


@pytest.mark.parametrize("silent", [math.nan, -3.0])
def test_a_weight_that_says_nothing_counts_as_the_mean(silent):
    draws = 20_000
    known = torch.tensor([1.0, 2.0, 6.0]).expand(draws, -1)
    filled = torch.cat([known, torch.full((draws, 1), silent)], 1)
    masked = sample_patches(filled, 0.25, 0.0, _generator()).masked
    shares = torch.bincount(masked.flatten(), minlength=4) / draws
    torch.testing.assert_close(shares, torch.tensor([1.0, 2.0, 6.0, 3.0]) / 12, atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-45, 3e38, math.nan, math.inf, -math.inf])
def test_any_constant_is_uniform(value):
    masked = sample_patches(torch.full((8000, 4), value), 0.25, 0.25, _generator()).masked
    counts = torch.bincount(masked.flatten(), minlength=4)
    assert (counts - 2000).abs().max() < 250


def test_the_generator_decides():
    weights = torch.rand(4, 49)
    first, again, other = (
        sample_patches(weights, 0.5, 0.2, _generator(seed)).masked for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("ratios", [(0.6, 0.4), (-0.1, 0.5), (0.001, 0.1), (0.5, 1.0)])
def test_ratios_that_leave_nothing_are_refused(ratios):
    with pytest.raises(ValueError, match="mask ratio"):
        sample_patches(torch.ones(1, 100), *ratios)


def test_weights_are_products_of_signals_over_their_means():
    a, b = torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 4.0]])
    torch.testing.assert_close(patch_weights({"a": a, "b": b}, {}), torch.tensor([[0.5, 1.5]]))
    squared = patch_weights({"a": a, "b": b}, {"a": 2.0})
    torch.testing.assert_close(squared, torch.tensor([[0.25, 2.25]]))
    ignored = patch_weights({"a": a, "b": torch.zeros(1, 2)}, {"a": 0.0})
    torch.testing.assert_close(ignored, torch.ones(1, 2))


def test_no_signal_is_refused():
    with pytest.raises(ValueError, match="no signal"):
        patch_weights({}, {})
