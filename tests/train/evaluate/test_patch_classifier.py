import numpy as np
import pytest
import torch
from samples import RANKS, encode, score, tar_bytes

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.pipeline.options import RandomView, WholeView
from famt.pipeline.sharding.segmentation_masks import IGNORED, crop_masks, read_masks
from famt.train.evaluate import patch_classifier as module
from famt.train.evaluate.evaluators.segment import Segment
from famt.train.evaluate.features import open_images
from famt.train.evaluate.patch_classifier import segment
from famt.train.evaluate.run import run as evaluate


@pytest.fixture
def masked(scored, tmp_path):
    """Shards of noise on which a bright square, or a dark one, is class 1 or 2."""
    paths = []
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12)):
        members = []
        for n in range(count):
            image = rng.integers(90, 130, (40, 48, 3), dtype=np.uint8)
            mask = np.zeros((40, 48), np.uint8)
            kind = 1 + n % 2
            top, left = rng.integers(0, 20), rng.integers(0, 24)
            image[top : top + 20, left : left + 24] = (230, 20)[kind - 1]
            mask[top : top + 20, left : left + 24] = kind
            mask[:3] = IGNORED
            members += [(f"{n}.png", encode(image, "PNG")), (f"{n}.mask.png",
                        encode(mask, "PNG"))]  # fmt: skip
        paths.append(tmp_path / f"{split}.tar")
        paths[-1].write_bytes(tar_bytes(members))
    score(paths, scored.cache, scored.spec)
    return [str(path) for path in paths]


def test_squares_are_found_and_the_mean_iou_is_that_of_a_slow_loop(masked, options, monkeypatch):
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder.eval()
    evaluation = options(
        Segment, train=[masked[0]], val=[masked[1]], steps=60, epochs=1, step_images=8
    )
    train, val = (open_images(evaluation, encoder, name, RANKS) for name in ("train", "val"))
    heads = []
    monkeypatch.setattr(module, "fit", lambda *args: heads.append(_fit(*args)) or heads[-1])
    values = dict(segment(encoder, train, val, evaluation))
    assert values["classes"] == 3
    assert values["miou"] > 0.6

    masks = read_masks(val.table)
    counts = np.zeros((3, 3), int)
    for crops in val.crops(WholeView()):
        predicted = module._logits(encoder, heads[0], crops).argmax(1)
        truth = crop_masks([masks[row] for row in crops.rows], crops.windows, crops.flips, 32)
        for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t != IGNORED:
                counts[t, p] += 1
    either = counts.sum(0) + counts.sum(1) - counts.diagonal()
    shares = counts.diagonal() / either
    assert values["miou"] == pytest.approx(sum(shares) / 3, abs=1e-6)
    assert values["pixel_accuracy"] == pytest.approx(counts.trace() / counts.sum(), abs=1e-6)


_fit = module.fit


def test_a_crop_of_no_class_at_all_teaches_nothing(masked, options):
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder.eval()
    evaluation = options(Segment, train=[masked[0]], steps=3, epochs=1, view=RandomView())
    train = open_images(evaluation, encoder, "train", RANKS)
    nothing = encode(np.full((40, 48), IGNORED, np.uint8), "PNG")
    head = module.fit(encoder, train, [nothing] * len(train), 3, evaluation)
    assert all(torch.isfinite(each).all() for each in head.parameters())


def test_a_run_is_tested_on_masks(trained, masked, options):
    values = evaluate(options(Segment, train=[masked[0]], val=[masked[1]], steps=2, epochs=1))
    assert values.keys() == {"classes", "miou", "pixel_accuracy"}


def test_masks_of_one_class_or_of_none_that_was_learned_are_refused(
    trained, scored, masked, options, tmp_path
):
    plain = {}
    for kind in (0, 7):
        members = []
        for n in range(3):
            image = np.full((40, 48, 3), 50 + n, np.uint8)
            mask = encode(np.full((40, 48), kind, np.uint8), "PNG")
            members += [(f"{n}.png", encode(image, "PNG")), (f"{n}.mask.png", mask)]
        plain[kind] = tmp_path / f"plain-{kind}.tar"
        plain[kind].write_bytes(tar_bytes(members))
    score(list(plain.values()), scored.cache, scored.spec)
    with pytest.raises(UserError, match=r"the masks of --train have 1 class"):
        evaluate(options(Segment, train=[str(plain[0])], val=[masked[1]]))
    with pytest.raises(UserError, match=r"--val shares no class with --train"):
        evaluate(options(Segment, train=[masked[0]], val=[str(plain[7])]))
