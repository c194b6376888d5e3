import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from famt.train.evaluate import neighbours as module
from famt.train.evaluate.neighbours import predict


def _clouds(count, seed):
    """Points of 7 classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (count,), generator=generator)
    centres = torch.randn(7, 16, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels


@pytest.mark.parametrize("parts", [(4096, 65536), (50, 17)])
def test_votes_are_scikit_learns_with_the_same_weights(monkeypatch, parts):
    monkeypatch.setattr(module, "_QUERIES", parts[0])
    monkeypatch.setattr(module, "_KEYS", parts[1])
    features, labels = _clouds(2000, 0)
    queries, truth = _clouds(1000, 1)
    oracle = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(features.numpy(), labels.numpy())
    expected = oracle.predict(queries.numpy())
    found = predict(features, labels, queries).numpy()
    assert 0.5 < (expected == truth.numpy()).mean() < 0.95
    assert (found == expected).mean() > 0.998


def test_with_fewer_images_than_neighbours_all_of_them_vote():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([4, 4, 2])
    queries = torch.tensor([[5.0, 1.0], [0.0, 3.0]])
    assert predict(features, labels, queries).tolist() == [4, 2]


def test_a_tiny_temperature_does_not_overflow():
    features, labels = _clouds(100, 0)
    assert predict(features, labels, features, temperature=1e-3).tolist() == labels.tolist()
