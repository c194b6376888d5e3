"""A model of one linear layer, whose gradients are made up from the number of the step."""

import copy
import dataclasses
import math

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from famt.train.config import OptimiserConfig
from famt.train.optimisation import Optimisation

CONFIG = OptimiserConfig(base_learning_rate=0.1, weight_decay=0.3, warmup_epochs=1, ema_decay=0.5)


def _make(config=CONFIG, *, epochs=3, steps_per_epoch=4, batch=128):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, Optimisation(
        config,
        model,
        param_groups_weight_decay(model, config.weight_decay),
        model,
        betas=(0.9, 0.95),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        effective_batch=batch,
    )


def _step(model, optimisation, size=1.0):
    generator = torch.Generator().manual_seed(optimisation.step)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    optimisation.update()


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_learning_rate_rises_for_the_warm_up_and_falls_along_a_cosine():
    model, optimisation = _make()
    peak = 0.1 * 128 / 256
    assert optimisation.learning_rate == pytest.approx(peak)
    seen = []
    while optimisation.step < optimisation.last_step:
        _step(model, optimisation)
        seen.append(optimisation.present_learning_rate)
    rise = [peak * step / 4 for step in range(4)]
    fall = [peak * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert seen == pytest.approx(rise + fall)
    assert optimisation.describe()["steps"] == "12 = 3 epochs x 4, 4 of warm-up; 12 done"


def test_a_warm_up_takes_half_of_a_short_run_at_most():
    _, optimisation = _make(dataclasses.replace(CONFIG, warmup_epochs=40))
    assert optimisation.warmup_steps == 6


@pytest.mark.parametrize(("epochs", "warmup"), [(2, 10), (100, 500), (800, 4000), (1600, 4000)])
def test_a_warm_up_is_a_twentieth_of_the_run_and_at_most_40_epochs(epochs, warmup):
    config = dataclasses.replace(CONFIG, warmup_epochs=None)
    _, optimisation = _make(config, epochs=epochs, steps_per_epoch=100)
    assert optimisation.warmup_steps == warmup


def test_groups_take_their_share_of_the_learning_rate():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "lr_scale": 0.25}, {"params": [model.bias]}]
    optimisation = Optimisation(
        CONFIG, model, groups, model,
        betas=(0.9, 0.95), epochs=1, steps_per_epoch=4, effective_batch=256,
    )  # fmt: skip
    optimisation.schedule.step_update(2)
    rates = [group["lr"] for group in optimisation.optimizer.param_groups]
    assert rates == pytest.approx([0.025, 0.1])
    assert optimisation.present_learning_rate == pytest.approx(0.1)


def test_a_large_gradient_is_cut_to_the_norm_and_all_are_gone_afterwards():
    model, optimisation = _make(dataclasses.replace(CONFIG, clip_norm=0.01))
    norms = []
    original = optimisation.optimizer.step

    def step():
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        original()

    optimisation.optimizer.step = step
    _step(model, optimisation, size=10.0)
    _step(model, optimisation, size=1e-5)
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] < 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_averaged_weights_follow_the_weights():
    model, optimisation = _make()
    expected = model.weight.detach().clone()
    for _ in range(3):
        _step(model, optimisation)
        expected = 0.5 * expected + 0.5 * model.weight.detach()
        torch.testing.assert_close(optimisation.ema.weight, expected)
    assert _make(dataclasses.replace(CONFIG, ema_decay=0.0))[1].ema is None


def _stopped(config=CONFIG, steps=5, **length):
    """A run's weights and state after some steps."""
    model, optimisation = _make(config, **length)
    for _ in range(steps):
        _step(model, optimisation)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return model, optimisation, weights, copy.deepcopy(optimisation.state_dict())


def _resumed(weights, state, config=CONFIG, *, exact, **length):
    model, optimisation = _make(config, **length)
    model.load_state_dict(weights)
    optimisation.load_state_dict(state) if exact else optimisation.restart(state, epoch=1)
    return model, optimisation


def test_a_resumed_run_ends_with_the_same_weights():
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    model, optimisation, weights, state = _stopped(config)
    assert (optimisation.step, optimisation.epoch) == (5, 1)
    resumed, after = _resumed(weights, state, config, exact=True)
    while optimisation.step < optimisation.last_step:
        _step(model, optimisation)
        _step(resumed, after)
    assert after.step == 12
    assert _equal(model.state_dict(), resumed.state_dict())
    assert _equal(optimisation.ema.state_dict(), after.ema.state_dict())


def test_an_elastic_run_counts_on_and_lays_the_schedule_out_anew_by_its_own_options():
    _, _, weights, state = _stopped()
    other = dataclasses.replace(CONFIG, base_learning_rate=0.2, weight_decay=0.1)
    model, after = _resumed(weights, state, other, exact=False, steps_per_epoch=10)
    assert after.step == 5
    assert after.last_step == 5 + 2 * 10  # one epoch of three is done
    assert after.progress(after.step) == pytest.approx(1 / 3)
    _step(model, after)  # the last of the warm-up is behind it
    assert after.present_learning_rate == pytest.approx(0.2 * 128 / 256)
    assert {group["weight_decay"] for group in after.optimizer.param_groups} == {0.0, 0.1}
    again = after.state_dict()
    assert (again["step"], after.epoch) == (6, 1)
    assert _resumed(weights, again, other, exact=True, steps_per_epoch=10)[1].last_step == 25


def test_a_run_that_begins_to_keep_an_average_begins_it_with_its_weights():
    plain = dataclasses.replace(CONFIG, ema_decay=0.0)
    _, _, weights, state = _stopped(plain)
    assert state["ema"] is None
    _, after = _resumed(weights, state, exact=False)
    assert _equal(after.ema.state_dict(), weights)
