"""Pictures, files and tars made on the spot, and the smallest model."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.models import MODELS, ModelConfig
from famt.patches import gather_patches, normalise
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import SampleTable
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.scoring.precompute import precompute_shard
from famt.pipeline.scoring.publish import publish
from famt.sampling import PatchSplit
from famt.train.distributed import Ranks
from famt.train.signals.signal import Context

RANKS = Ranks(0, 1, "here", torch.device("cpu"))
"""a run of one process"""

TINY = ModelConfig(
    image_size=32, patch_size=8, width=24, depth=2, heads=3,
    decoder_width=16, decoder_depth=2, decoder_heads=2,
)  # fmt: skip


def photo(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A smooth colour picture with a bright object, `[height, width, 3]` uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 160, (4, 4, 3), dtype=np.uint8))
    picture = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    picture[top : top + height // 3, left : left + width // 3] = rng.integers(160, 256, 3)
    return picture


def encode(picture: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of a picture in a file format."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A tar of those files, in that order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of those files at a path, which it returns."""
    path.write_bytes(tar_bytes(members))
    return path


def split_pixels(images: Tensor, split: PatchSplit, patch_size: int) -> tuple[Tensor, Tensor]:
    """Normalised pixels of the visible and of the predicted patches of uint8 images."""
    visible, predicted = (
        normalise(gather_patches(images, index, patch_size))
        for index in (split.visible, split.predicted)
    )
    return visible, predicted


def photo_members(count: int, first: int = 0, **size: int) -> list[tuple[str, bytes]]:
    """Members of a labelled shard: `img0007.jpg`, `img0007.cls`, ..."""
    members = []
    for n in range(first, first + count):
        members.append((f"img{n:04d}.jpg", encode(photo(n, **size), quality=92)))
        members.append((f"img{n:04d}.cls", str(n % 3).encode()))
    return members


def write_shards(folder: Path, *counts: int, **size: int) -> list[Path]:
    """Shards of so many photos each, all different: `train-000000.tar`, ..."""
    folder.mkdir(exist_ok=True)
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    return [
        write_tar(folder / f"train-{number:06d}.tar", photo_members(count, first, **size))
        for number, (count, first) in enumerate(zip(counts, firsts, strict=True))
    ]


def score(urls: list[Path], cache: ScoreCache, spec: ScoreSpec) -> None:
    """What the Ray job does, in this process."""
    publish([precompute_shard(str(url), cache, spec) for url in urls], cache, spec)


@dataclass(frozen=True)
class Rows:
    """So many rows without images."""

    count: int
    digest: str = "rows"

    def __len__(self) -> int:
        return self.count


def context(
    encoder: VisionTransformer, samples: SampleTable | Rows, ranks: Ranks, **options: object
) -> Context:
    """What a signal that reads no cache may ask of a run of `vit_nano`."""
    return Context(samples, MODELS["vit_nano"], encoder, ranks, lambda: None, "", **options)
