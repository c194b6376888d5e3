"""The packages in docs/ that bring a published way to mask: as written, installed, trained with."""

import math
import tomllib
from pathlib import Path

import pytest
import torch
from runs import log_points
from samples import context, photo

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.patches import normalise_images
from famt.sampling import patch_weights, sample_patches
from pipeline import scores
from pipeline.loader import CropBatch
from pipeline.model_scores import model_scores
from train.config import parse
from train.distributed import join_ranks
from train.pretrain import main
from train.signals import weights
from train.signals.config import FrequencyConfig

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package of docs/ and its entry points known, as pip would."""

    def found(name):
        project = tomllib.loads((DOCS / name / "pyproject.toml").read_text())["project"]
        folder = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        folder.mkdir()
        head = f"Name: {project['name']}\nVersion: {project['version']}\n"
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{head}")
        sections = [
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
            for group, points in project["entry-points"].items()
        ]
        (folder / "entry_points.txt").write_text("\n".join(sections))
        for path in (tmp_path, DOCS / name):
            monkeypatch.syspath_prepend(str(path))
        forget()

    def forget():
        scores._plugins.cache_clear()
        weights._added.cache_clear()

    yield found
    forget()


def _train(recipe, scored, tmp_path):
    """Two epochs; the losses of their log points."""
    arguments = f"""--recipe {DOCS / recipe} --cache {scored.cache.url} --out {tmp_path / "run"}
        --model vit_nano --epochs 2 --batch-size 8 --optimiser.warmup-epochs 1 --log-steps 1
        --device cpu --threads 1 --shards"""
    main(parse([*arguments.split(), *scored.shards], None))
    return [point["loss"] for point in log_points(tmp_path / "run")]


def _crops(rows):
    images = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8)
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(rows, 4)
    return CropBatch(images, torch.arange(rows), windows, torch.zeros(rows, dtype=torch.bool))


@pytest.mark.parametrize(
    ("package", "recipe"), [("sbam", "sbam.toml"), ("color_noise", "color-noise.toml")]
)
def test_a_run_trains_by_the_recipe_of_a_package(package, recipe, install, scored, tmp_path):
    install(package)
    losses = _train(f"{package}/{recipe}", scored, tmp_path)
    assert len(losses) == 6
    assert all(0 < loss < 10 for loss in losses)


def test_a_package_is_at_most_forty_lines():
    for module in ("sbam/sbam.py", "color_noise/color_noise.py"):
        assert len((DOCS / module).read_text().splitlines()) <= 40, module


def test_salience_is_the_softmax_that_a_patch_receives_from_all_others(install):
    install("sbam")
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder.eval()
    photos = [torch.from_numpy(photo(seed, 32, 32)) for seed in range(3)]
    images = normalise_images(torch.stack(photos))
    found = model_scores(["sbam_salience"], encoder, images)["sbam_salience"]
    embedded = encoder.patch_embed(images).detach() + encoder.pos_embed[:, 1:]
    for tokens, of_image in zip(embedded.double(), found.double(), strict=True):
        received = [0.0] * 64
        for i in range(64):
            products = [float(tokens[i] @ tokens[j]) for j in range(64)]
            looks = [math.exp(each - max(products)) for each in products]
            for j in range(64):
                received[j] += looks[j] / sum(looks)
        low, high = min(received), max(received)
        for j in range(64):
            expected = pytest.approx((received[j] - low) / (high - low), abs=1e-4)
            assert of_image[j].log().item() == expected
    flat = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        encoder.pos_embed.zero_()
    same = model_scores(["sbam_salience"], encoder, flat)["sbam_salience"]
    torch.testing.assert_close(same, torch.ones(1, 64))


def test_the_draw_adds_about_the_noise_that_sbam_adds():
    """Of two patches, the one of less salience is masked about as often as by s + U(0, 0.5)."""
    torch.manual_seed(0)
    salience = torch.tensor([0.5, 0.65]).expand(40_000, 2)
    split = sample_patches(patch_weights({"a": salience.exp()}, {"a": 9.0}), 0.5, 0.0)
    ours = (split.masked[:, 0] == 0).float().mean().item()
    published = (salience + torch.rand(40_000, 2) / 2).argmax(1).eq(0).float().mean().item()
    assert ours == pytest.approx(published, abs=0.04)


def test_green_noise_has_its_power_in_a_band_and_masks_in_small_groups(install):
    install("color_noise")
    with join_ranks("cpu") as ranks:
        encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder
        slot = FrequencyConfig("green_noise", exponent=10.0)
        run = context(encoder, range(500), ranks, frequency=slot)
        signal = weights.build_signals(run)[0]
    crops = _crops(500)
    drawn = signal.read(crops, 7)
    assert torch.equal(drawn, signal.read(crops, 7))
    assert not torch.equal(drawn, signal.read(crops, 8))
    noise = drawn.log().view(500, 8, 8)
    near, far = (_correlation(noise, shift) for shift in (1, 3))
    # By the two Gaussians' products; the ends of the spectrum and of the crop move them a little.
    assert near == pytest.approx(_expected(1.0), abs=0.06)  # neighbours go together
    assert far == pytest.approx(_expected(3.0), abs=0.04)  # and groups stay small
    split = sample_patches(patch_weights({"a": drawn}, {"a": signal.exponent}), 0.75, 0.0)
    masked = torch.zeros(500, 64).scatter(1, split.masked, 1.0).view(500, 8, 8)
    assert _correlation(masked, 1) > 0.1  # drawn uniformly: -1 / 63


def _expected(shift, fine=0.5, coarse=2.0):
    """Correlation of noise at that shift, after the difference of two Gaussian blurs."""

    def both(a, b, at):
        return math.exp(-(at**2) / 2 / (a**2 + b**2)) / (a**2 + b**2)

    def covariance(at):
        return both(fine, fine, at) - 2 * both(fine, coarse, at) + both(coarse, coarse, at)

    return covariance(shift) / covariance(0.0)


def _correlation(maps, shift):
    """Of cells and those so many columns beside them, over all maps."""
    left, right = maps[:, :, :-shift].flatten(), maps[:, :, shift:].flatten()
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])
