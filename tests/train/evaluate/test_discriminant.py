import numpy as np
import pytest
import torch
from samples import RANKS
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS

from famt.train.evaluate.discriminant import discriminants


@pytest.fixture
def known():
    """Correlated features `[90, 5]` of three classes, one of them rare."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    features = generator.normal(size=(90, 5)) @ generator.normal(size=(5, 5))
    features += generator.normal(size=(3, 5))[labels] + 20
    return features, labels


def _batches(features, labels):
    return zip(
        torch.from_numpy(features).float().split(7), torch.from_numpy(labels).split(7), strict=True
    )


def test_logits_are_log_posteriors_of_normal_distributions_but_not_too_sure(known):
    features, labels = known
    weights, biases = discriminants(_batches(features, labels), 3, RANKS)
    logits = features @ weights.double().numpy().T + biases.double().numpy()
    means = np.stack([features[labels == each].mean(0) for each in range(3)])
    covariance = OAS(assume_centered=True).fit(features - means[labels]).covariance_
    expected = np.stack(
        [
            multivariate_normal(mean, covariance).logpdf(features) + np.log((labels == each).mean())
            for each, mean in enumerate(means)
        ],
        axis=1,
    )
    for found in (logits, expected):
        found -= found.mean(1, keepdims=True)
    scale = logits.std() / expected.std()
    assert scale < 1
    np.testing.assert_allclose(logits, scale * expected, atol=2e-3)
    at_means = np.stack([logits[labels == each].mean(0) for each in range(3)])
    margin = np.diag(at_means) - (at_means.sum(1) - np.diag(at_means)) / 2
    assert margin.mean() == pytest.approx(np.log(0.9 / 0.05), rel=1e-3)


def test_few_images_in_many_dimensions_give_moderate_logits():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(24, 96, generator=generator), torch.arange(24) % 2
    weights, biases = discriminants([(features, labels)], 2, RANKS)
    others = torch.randn(1000, 96, generator=generator) @ weights.T + biases
    assert (others[:, 0] - others[:, 1]).abs().max() < 20


def test_a_class_without_images_is_the_least_likely(known):
    weights, biases = discriminants(_batches(*known), 5, RANKS)
    assert weights.shape == (5, 5)
    assert not weights[3:].any()
    logits = torch.from_numpy(known[0]).float() @ weights.T + biases
    assert (logits.argmax(1) < 3).all()
    assert biases.isfinite().all()
