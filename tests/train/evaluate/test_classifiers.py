import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from famt.pipeline.errors import UserError
from famt.train.evaluate.classifiers import Setting, attentive_pool, choose, fit, part, score
from famt.train.evaluate.evaluators.probe import Probe
from famt.train.evaluate.features import Features
from famt.train.evaluate.run import run as evaluate

CPU = torch.device("cpu")


def _features(count, classes=5, width=12, patches=6, seed=0):
    """Correlated features that a line tells apart in part."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    fixed = torch.Generator().manual_seed(99)
    centres, mix = torch.randn(classes, width, generator=fixed), torch.randn(width, width)
    tokens = centres[labels][:, None] + 3 * torch.randn(count, patches, width, generator=generator)
    mix = torch.randn(width, width, generator=fixed)
    tokens = 10 + tokens @ mix
    return Features(tokens[:, 0], tokens.mean(1), tokens.half(), labels)


def _quick(options, **others):
    return options(Probe, steps=100, epochs=1, step_images=100, **others)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_a_classifier_converges_to_scikit_learns(options, penalty):
    train, val = _features(700), _features(2000, seed=1)
    settings = [Setting("cls", 3e-2, penalty), Setting("mean", 3e-2, penalty)]
    rows = torch.arange(700)
    quick = options(Probe, epochs=1)
    classifiers = fit(train, rows, settings, quick, 5, 2, CPU)
    predicted = classifiers.logits(val, 64, CPU).argmax(-1)
    for setting, mine in zip(settings, predicted, strict=True):
        known, asked = getattr(train, setting.pooling), getattr(val, setting.pooling)
        deviation, mean = torch.std_mean(known, dim=0, correction=0)
        oracle = LogisticRegression(C=1 / penalty, max_iter=1000)
        oracle.fit(((known - mean) / deviation).numpy(), train.labels.numpy())
        expected = torch.from_numpy(oracle.predict(((asked - mean) / deviation).numpy()))
        right, expected_right = (each == val.labels for each in (mine, expected))
        assert abs(right.float().mean() - expected_right.float().mean()) <= 0.002
        assert (mine == expected).float().mean() > 0.99


def test_classifiers_side_by_side_are_those_trained_alone(options):
    train = _features(150)
    settings = [
        Setting("attentive", 1e-2, 1.0), Setting("cls", 3e-2, 0.1), Setting("mean", 1e-3, 10.0),
        Setting("attentive", 1e-3, 0.0),
    ]  # fmt: skip
    rows = torch.arange(120)
    together = fit(train, rows, settings, _quick(options), 5, 2, CPU).logits(train, 64, CPU)
    for n, setting in enumerate(settings):
        alone = fit(train, rows, [setting], _quick(options), 5, 2, CPU).logits(train, 64, CPU)
        torch.testing.assert_close(together[n], alone[0], atol=1e-4, rtol=1e-3)


def test_attentive_pooling_is_that_of_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, 8, generator=generator)
    queries = torch.randn(2, 4, 8, generator=generator)
    pooled = attentive_pool(tokens, queries)
    assert pooled.shape == (2, 3, 8)
    for setting in range(2):
        for image in range(3):
            for channel in range(8):
                query = queries[setting, channel // 2].tolist()
                votes = [
                    math.exp(sum(q * x for q, x in zip(query, token, strict=True)) / math.sqrt(8))
                    for token in tokens[image].tolist()
                ]
                values = [float(token[channel]) for token in tokens[image]]
                expected = sum(v * x for v, x in zip(votes, values, strict=True)) / sum(votes)
                assert float(pooled[setting, image, channel]) == pytest.approx(expected, abs=1e-5)


def test_attention_finds_the_patch_that_tells(options):
    """In one patch of 16 lies the class, marked by a channel of its own; the mean drowns it."""
    generator = torch.Generator().manual_seed(0)

    def make(count):
        labels = torch.randint(0, 2, (count,), generator=generator)
        tokens = torch.randn(count, 16, 8, generator=generator)
        where = torch.randint(0, 16, (count,), generator=generator)
        tokens[torch.arange(count), where, 0] = 8.0
        tokens[torch.arange(count), where, 1] = 4.0 * labels - 2
        return Features(tokens[:, 0], tokens.mean(1), tokens.half(), labels)

    values = dict(score(make(1000), make(500), _quick(options), 2, CPU))
    assert values["pooling"] == "attentive"
    assert values["top1"] == values["top1_attentive"] > values["top1_mean"] + 0.1


def test_the_images_to_test_on_choose_nothing(options):
    train, val = _features(150), _features(200, seed=1)
    guessed = Features(val.cls, val.mean, val.tokens, 4 - val.labels)
    one, other = (dict(score(train, each, _quick(options), 2, CPU)) for each in (val, guessed))
    of_choice = [name for name in one if not name.startswith(("top1", "stderr"))]
    assert len(of_choice) == 10
    assert {name: one[name] for name in of_choice} == {name: other[name] for name in of_choice}
    assert one["top1"] > 2 * other["top1"]


def test_every_pooling_is_chosen_for(options):
    chosen = choose(_features(300), _quick(options), 5, 2, CPU)
    assert [setting.pooling for setting in chosen] == ["cls", "mean", "attentive"]
    assert all(0.3 < share <= 1 for share in chosen.values())


def test_images_are_held_out_of_every_class_alike():
    labels = torch.arange(200) % 4
    kept, held_out = part(labels, 0.1, seed=0)
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(200))
    assert labels[held_out].bincount().tolist() == [5, 5, 5, 5]
    assert not torch.equal(held_out, part(labels, 0.1, seed=1)[1])
    with pytest.raises(UserError, match="1 labelled images are too few"):
        part(torch.zeros(1), 0.1, seed=0)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.35, 0.45, 0.5])
def test_the_share_that_is_held_out_is_the_one_that_was_asked_for(share):
    kept, held_out = part(torch.zeros(1000), share, seed=0)
    assert len(held_out) == pytest.approx(1000 * share, abs=1)
    assert len(kept) == 1000 - len(held_out)


def test_a_run_is_probed(trained, options):
    values = evaluate(options(Probe, steps=5, epochs=1))
    assert values["pooling"] in ("cls", "mean", "attentive")
    assert values["top1"] == values[f"top1_{values['pooling']}"]
    assert 0 <= values["top1"] <= 1


@pytest.mark.parametrize("wrong", [{"learning_rates": ()}, {"poolings": ()}])
def test_lists_to_choose_from_must_not_be_empty(options, wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        options(Probe, **wrong)
