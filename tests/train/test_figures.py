import numpy as np
import torch
from PIL import Image

from famt.mae import MODELS, MaskedAutoencoder
from train import checkpoint
from train.checkpoint import Checkpoint
from train.figures import Figures, main


def test_a_picture_has_a_row_an_image_and_a_column_a_stage(scored, tmp_path):
    model = MaskedAutoencoder(MODELS["vit_nano_32"])
    checkpoint.save(
        tmp_path / "run" if (tmp_path / "run").mkdir() is None else tmp_path,
        Checkpoint(1, "vit_nano_32", model.state_dict(), {}, [], [torch.zeros(1)], {}),
    )
    out = main(
        Figures(
            checkpoint=tmp_path / "run", cache=scored.cache.url, shards=scored.shards,
            out=tmp_path / "new" / "picture.png", images=3, spec=scored.spec,
        )
    )  # fmt: skip
    picture = np.array(Image.open(out).convert("RGB"))
    height, width, _ = picture.shape
    assert 1.7 < width / height < 2.1  # 6 columns by 3 rows
    cells = [part for row in np.array_split(picture[40:], 3) for part in np.array_split(
        row, 6, axis=1)]  # fmt: skip
    assert all(cell.std() > 1 for cell in cells)  # nothing is left blank
