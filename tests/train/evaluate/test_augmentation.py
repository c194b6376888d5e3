import pytest
import torch

from famt.train.evaluate.augmentation import Mixer
from famt.train.evaluate.evaluators.finetune import Mixing

PLAIN = {"randaugment": "", "mixup": 0, "cutmix": 0, "label_smoothing": 0, "drop_path": 0}


@pytest.fixture
def batch():
    """24 images, in turn of class 0 and red, and of class 1 and green."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (24, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(24) % 2
    images[labels == 0, ..., 0] += 150
    images[labels == 1, ..., 1] += 150
    return images, labels


def test_without_mixing_targets_are_the_classes(batch):
    mixed = Mixer(Mixing(**PLAIN), 3).mix(*batch, (0, 0, 0))
    assert torch.equal(mixed.targets, torch.eye(3)[batch[1]])
    assert mixed.images.shape == (24, 3, 32, 32)
    assert mixed.images.dtype == torch.float32


def test_label_smoothing_gives_all_classes_a_share(batch):
    mixed = Mixer(Mixing(**{**PLAIN, "label_smoothing": 0.3}), 3).mix(*batch, (0, 0, 0))
    expected = 0.7 * torch.eye(3)[batch[1]] + 0.1
    torch.testing.assert_close(mixed.targets, expected)


def test_targets_say_how_images_were_mixed(batch):
    mixer, least = Mixer(Mixing(**{**PLAIN, "cutmix": 1.0}), 2), []
    for step in range(6):
        mixed = mixer.mix(*batch, (0, step, 0))
        assert mixed.targets.sum(1).tolist() == pytest.approx([1.0] * 24)
        # Their share of red pixels is their share of class 0.
        red = (mixed.images[:, 0] > mixed.images[:, 1]).float().mean((1, 2))
        torch.testing.assert_close(mixed.targets[:, 0], red, atol=0.02, rtol=0)
        least.append(mixed.targets.max(1).values.min())
    assert min(least) < 0.8


def test_what_is_drawn_depends_on_the_numbers_alone(batch):
    mixer = Mixer(Mixing().resolved(100), 2)
    first = mixer.mix(*batch, (0, 5, 1))
    other = mixer.mix(*batch, (0, 6, 1))
    again = mixer.mix(*batch, (0, 5, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, other.images)


def test_the_strongest_augmentation_takes_every_image(batch):
    mixer = Mixer(Mixing("rand-m10-n4-mstd0.5-inc1").resolved(100), 2)
    for step in range(5):  # 480 operations, of which some 30 posterize
        assert mixer.mix(*batch, (0, step, 0)).images.isfinite().all()
