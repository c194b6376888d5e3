import numpy as np
import torch
from PIL import Image
from samples import photo

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.patches import normalise_images
from train.features import labelled_features


def test_features_are_those_of_each_images_centre(scored):
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano"]).encoder.eval()
    features, labels = labelled_features(
        encoder, scored.shards, scored.cache, centre=1.0, batch_size=8, pool="cls", threads=1,
        device=torch.device("cpu"), name="features",
    )  # fmt: skip
    assert features.shape == (26, 96)
    assert labels.tolist() == [n % 3 for n in range(26)]
    for n in (0, 13, 25):
        picture = (
            Image.fromarray(photo(n))
            .crop((4, 0, 44, 40))
            .resize((32, 32), Image.Resampling.BICUBIC)
        )
        with torch.no_grad():
            expected = encoder.forward_features(
                normalise_images(torch.from_numpy(np.array(picture))[None])
            )[0, 0]
        similarity = torch.cosine_similarity(features[n], expected, dim=0)
        others = torch.cosine_similarity(features[(n + 1) % 26], expected, dim=0)
        assert similarity > 0.98
        assert similarity > others
