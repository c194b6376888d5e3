import dataclasses

import numpy as np
from PIL import Image

from train.figures import Figures, main
from train.pretrain import main as pretrain


def test_a_picture_has_a_row_an_image_and_a_column_a_stage(config, scored, tmp_path):
    pretrain(dataclasses.replace(config, epochs=1))
    out = main(
        Figures(
            checkpoint=tmp_path / "run", cache=scored.cache.url, shards=scored.shards,
            out=tmp_path / "new" / "picture.png", images=3,
        )
    )  # fmt: skip
    picture = np.array(Image.open(out).convert("RGB"))
    height, width, _ = picture.shape
    assert 1.7 < width / height < 2.1  # 6 columns by 3 rows
    cells = [part for row in np.array_split(picture[40:], 3) for part in np.array_split(
        row, 6, axis=1)]  # fmt: skip
    assert all(cell.std() > 1 for cell in cells)  # nothing is left blank
