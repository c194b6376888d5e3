import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import RANKS, photo

from famt.patches import normalise_images
from famt.pipeline.errors import UserError
from famt.train.evaluate.evaluation import Evaluation
from famt.train.evaluate.features import open_images, require_labels, standard_error, top1


@pytest.fixture
def images(encoder, options):
    """The nine to test on."""
    return open_images(options(Evaluation), encoder.eval(), "val", RANKS)


def test_features_are_those_of_each_images_centre(scored, encoder, options):
    evaluation = options(Evaluation, train=scored.shards)
    images = open_images(evaluation, encoder.eval(), "train", RANKS)
    features = images.features(encoder, tokens=True)
    assert features.cls.shape == features.mean.shape == (26, 96)
    assert features.tokens.shape == (26, 64, 96)
    assert features.labels.tolist() == [n % 3 for n in range(26)]
    assert images.classes == 3
    for n in (0, 13, 25):
        picture = (
            Image.fromarray(photo(n))
            .crop((4, 0, 44, 40))
            .resize((32, 32), Image.Resampling.BICUBIC)
        )
        with torch.no_grad():
            expected = encoder.forward_features(
                normalise_images(torch.from_numpy(np.array(picture))[None])
            )[0]
        similarity = torch.cosine_similarity(features.cls[n], expected[0], dim=0)
        others = torch.cosine_similarity(features.cls[(n + 1) % 26], expected[0], dim=0)
        assert similarity > 0.98
        assert similarity > others
        torch.testing.assert_close(
            features.tokens[n].float().mean(0), features.mean[n], atol=1e-3, rtol=0
        )


def test_patch_tokens_are_kept_only_where_they_are_asked_for(encoder, images):
    features = images.features(encoder)
    assert features.tokens is None
    taken = features.take(torch.tensor([4, 0]))
    assert taken.labels.tolist() == features.labels[[4, 0]].tolist()
    assert torch.equal(taken.mean, features.mean[[4, 0]])


def test_evaluated_shards_are_read_from_where_they_are_staged(scored, encoder, options, tmp_path):
    evaluation = options(Evaluation, train=scored.shards, stage=tmp_path / "disk")
    images = open_images(evaluation, encoder, "train", RANKS)
    for shard in scored.shards:
        Path(shard).unlink()
    assert images.features(encoder).cls.isfinite().all()


def test_a_class_of_a_number_that_no_classifier_can_have_is_named(images):
    images.table.labels[4] = 2_000_000_000
    with pytest.raises(UserError, match=r"\.tar:.* has class 2000000000; classes must"):
        require_labels(images)


@pytest.mark.parametrize("label", [0, 5])
def test_images_of_one_class_are_nothing_to_tell_apart(images, label):
    images.table.labels[:] = label
    with pytest.raises(
        UserError, match=rf"\.tar:.* and all other training samples have class {label}"
    ):
        require_labels(images)


def test_features_that_are_no_numbers_are_an_error_that_names_an_image(encoder, images):
    torch.nn.init.constant_(encoder.norm.weight, torch.nan)
    with pytest.raises(FloatingPointError, match=r"features of 9 images, .*\.tar:.* earlier"):
        images.features(encoder)


def test_accuracy_and_its_standard_error():
    assert top1(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 0.75
    draws = np.random.default_rng(0).binomial(400, 0.3, 20_000) / 400
    assert math.isclose(standard_error(0.3, 400), draws.std(), rel_tol=0.02)
