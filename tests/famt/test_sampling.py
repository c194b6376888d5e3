import itertools
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.patch_counts import patch_counts
from famt.sampling import PatchSplit, loss_weights, patch_weights, predict_some, sample_patches


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


def _exact(weights, counts, visible, thrown):
    """Probability of every (masked, thrown, visible), each a set, drawn one patch at a time."""
    masked, _, seen = counts
    everyone, exact = range(len(weights)), {}
    uniform = visible == "uniform"
    choices = [*itertools.combinations(everyone, seen)] if uniform else [()]
    for hints in choices:
        for order in itertools.permutations(n for n in everyone if n not in hints):
            probability, left = 1 / len(choices), sum(weights[n] for n in order)
            for n in order:
                probability *= weights[n] / left
                left -= weights[n]
            if uniform:
                groups = order[:masked], order[masked:], hints
            elif thrown == "heaviest":
                middle = len(weights) - seen
                groups = order[:masked], order[masked:middle], order[middle:]
            else:
                middle = masked + seen
                groups = order[:masked], order[middle:], order[masked:middle]
            split = tuple(map(frozenset, groups))
            exact[split] = exact.get(split, 0.0) + probability
    return exact


@pytest.mark.parametrize("visible", ["lightest", "uniform"])
@pytest.mark.parametrize("thrown", ["heaviest", "lightest"])
@pytest.mark.parametrize("blend", [1.0, 0.6, 0.0])
def test_every_policy_draws_each_split_as_often_as_one_patch_at_a_time_would(
    visible, thrown, blend
):
    weights, draws = [1.0, 2.0, 3.0, 6.0, 0.5], 30_000
    mean = sum(weights) / 5
    blended = [(1 - blend) + blend * each / mean for each in weights]
    exact = _exact(blended, (2, 1, 2), visible, thrown)
    assert sum(exact.values()) == pytest.approx(1)
    split = sample_patches(
        torch.tensor([weights]).expand(draws, -1), 0.4, 0.2, _generator(7),
        visible=visible, thrown=thrown, blend=blend,
    )  # fmt: skip
    assert [each.shape[1] for each in (split.masked, split.thrown, split.visible)] == [2, 1, 2]
    found = dict.fromkeys(exact, 0)
    for groups in zip(*(vars(split)[name].tolist() for name in ("masked", "thrown", "visible")),
                      strict=True):  # fmt: skip
        found[tuple(frozenset(group) for group in groups)] += 1
    expected = [exact[each] * draws for each in exact]
    assert scipy.stats.chisquare(list(found.values()), expected).pvalue > 1e-4


@given(
    st.integers(2, 60), st.floats(0.05, 0.9), st.floats(0, 0.9), st.integers(0, 999),
    st.sampled_from(["lightest", "uniform"]), st.sampled_from(["heaviest", "lightest"]),
    st.floats(0, 1), st.sampled_from([0.0, math.inf, math.nan, -1.0, 1e300, 1e-300]),
)  # fmt: skip
def test_every_policy_parts_any_weights(patches, mask, throw, seed, visible, thrown, blend, odd):
    throw = min(throw, 0.95 - mask)
    if throw < 0 or int(patches * mask) < 1:
        return
    weights = torch.rand(3, patches, generator=_generator(seed), dtype=torch.float64)
    weights[0, seed % patches] = odd
    weights[1] = odd
    split = sample_patches(
        weights, mask, throw, _generator(seed), visible=visible, thrown=thrown, blend=blend
    )
    together = torch.cat([split.masked, split.thrown, split.visible], 1)
    assert (together.sort(1).values == torch.arange(patches)).all()
    groups = (split.masked, split.thrown, split.visible)
    assert tuple(each.shape[1] for each in groups) == patch_counts(patches, mask, throw)
    assert split.predicted is split.masked


def test_the_papers_policy_takes_nothing_more_from_the_generator():
    weights, ours, plain = torch.rand(4, 49), _generator(5), _generator(5)
    split = sample_patches(weights, 0.5, 0.2, ours, visible="lightest", thrown="heaviest")
    predict_some(split, 1.0, "spread", ours)
    order = (weights.double().log() - torch.empty(4, 49, dtype=torch.float64).exponential_(
        generator=plain).log()).argsort(1, descending=True)  # fmt: skip
    assert torch.equal(torch.cat([split.masked, split.thrown, split.visible], 1), order)
    assert torch.equal(ours.get_state(), plain.get_state())


def test_blending_half_keeps_hopeless_patches_in_the_draw():
    weights = torch.tensor([[0.0, 0.0, 0.0, 4.0]]).expand(20_000, -1)
    first = sample_patches(weights, 0.25, 0.25, _generator(), blend=0.5).masked[:, 0]
    shares = torch.bincount(first, minlength=4) / 20_000
    torch.testing.assert_close(
        shares, torch.tensor([0.125, 0.125, 0.125, 0.625]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("blend", [-0.1, 1.5, math.nan])
def test_a_blend_outside_0_to_1_is_refused(blend):
    with pytest.raises(ValueError, match="blend"):
        sample_patches(torch.ones(1, 9), 0.5, 0.2, blend=blend)


def _masked(rows):
    """A split of a 6 x 6 grid that masks those patches."""
    others = [[n for n in range(36) if n not in row] for row in rows]
    empty = torch.empty(len(rows), 0, dtype=torch.int64)
    return PatchSplit(torch.tensor(rows), empty, torch.tensor(others))


def test_a_random_share_of_the_masked_is_predicted_each_set_alike():
    split = _masked([[3, 30, 8, 11, 22]])
    many = PatchSplit(*(vars(split)[name].expand(10_000, -1)
                        for name in ("masked", "thrown", "visible")))  # fmt: skip
    predicted = predict_some(many, 0.5, "random", _generator()).predicted
    sets = [frozenset(row) for row in predicted.tolist()]
    pairs = [frozenset(pair) for pair in itertools.combinations([3, 30, 8, 11, 22], 2)]
    assert set(sets) == set(pairs)
    assert scipy.stats.chisquare([sets.count(pair) for pair in pairs]).pvalue > 1e-4


@settings(max_examples=50)
@given(st.integers(2, 30), st.floats(0.02, 1.0), st.integers(0, 999))
def test_a_spread_share_is_greedily_furthest_from_what_was_chosen(count, share, seed):
    generator = _generator(seed)
    rows = torch.rand(2, 36, generator=generator).argsort(1)[:, :count].tolist()
    predicted = predict_some(_masked(rows), share, "spread", generator).predicted
    assert predicted.shape == (2, count if share == 1 else max(1, int(count * share)))
    for masked, chosen in zip(rows, predicted.tolist(), strict=True):
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(masked)

        def distance(n, others):
            return min((n // 6 - m // 6) ** 2 + (n % 6 - m % 6) ** 2 for m in others)

        if share == 1:
            continue
        for number in range(1, len(chosen)):
            before = chosen[:number]
            furthest = max(distance(n, before) for n in set(masked) - set(before))
            assert distance(chosen[number], before) == furthest


def test_a_spread_share_begins_anywhere_and_breaks_ties_evenly():
    corners = [0, 5, 30, 35]
    split = PatchSplit(torch.tensor(corners).expand(8000, -1), torch.empty(8000, 0).long(),
                       torch.arange(32).expand(8000, -1))  # fmt: skip
    pairs = predict_some(split, 0.5, "spread", _generator()).predicted
    assert set(map(tuple, pairs.tolist())) == {(0, 35), (35, 0), (5, 30), (30, 5)}
    counts = torch.bincount(pairs[:, 0], minlength=36)[corners]
    assert (counts - 2000).abs().max() < 250
    first, second = predict_some(split, 0.75, "spread", _generator()).predicted[:, [0, 2]].T
    third = second[first == 0]
    assert abs((third == 5).float().mean() - 0.5) < 0.06


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_a_predicted_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="predicted share"):
        predict_some(_masked([[1, 2]]), share)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_loss_weights_are_powers_with_mean_1_over_each_images_masked_patches(exponent):
    weights = torch.rand(5, 36, generator=_generator()) + 0.1
    split = predict_some(
        sample_patches(weights, 0.5, 0.2, _generator(1)), 0.4, "random", _generator(2)
    )
    found = loss_weights(weights, split, exponent)
    for b in range(5):
        masked = [float(weights[b, n]) ** exponent for n in split.masked[b]]
        for column, n in enumerate(split.predicted[b].tolist()):
            expected = float(weights[b, n]) ** exponent / (sum(masked) / len(masked))
            assert float(found[b, column]) == pytest.approx(expected, rel=1e-5)
    whole = loss_weights(weights, PatchSplit(split.masked, split.thrown, split.visible), exponent)
    torch.testing.assert_close(whole.mean(1), torch.ones(5))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0, 1e-45, 3e38])
def test_loss_weights_of_any_constant_are_1(value):
    split = sample_patches(torch.ones(2, 36), 0.5, 0.2)
    found = loss_weights(torch.full((2, 36), value), split, 2.0)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_weight_that_says_nothing_counts_as_the_mean_in_the_loss():
    weights = torch.tensor([[1.0, 3.0, math.nan, math.inf]])
    split = PatchSplit(torch.tensor([[0, 1, 2, 3]]), *[torch.empty(1, 0).long()] * 2)
    torch.testing.assert_close(
        loss_weights(weights, split, 1.0), torch.tensor([[0.5, 1.5, 1.0, 1.0]])
    )
