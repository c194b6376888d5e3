"""What all evaluators stand on: labelled images, and their features from a frozen encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from famt.patches import normalise_images
from famt.pipeline.cache import ScoreCache
from famt.pipeline.dataset import SampleTable, load_samples
from famt.pipeline.errors import UserError
from famt.pipeline.loader import CropBatch, CropLoader
from famt.pipeline.options import CentreView, LoaderConfig, View
from famt.pipeline.stage import stage_shards
from famt.train.distributed import Ranks
from famt.train.evaluate.options import Evaluation
from famt.train.streams import Stop

_MOST_CLASSES = 100_000  # ImageNet-21k has 21,841; a classifier has a row for each

Value = float | int | str
Options = TypeVar("Options", bound=Evaluation)
Results = Iterable[tuple[str, Value]]
Evaluator = Callable[[VisionTransformer, "Images", "Images", Options], Results]


@dataclass(frozen=True)
class Features:
    """What an encoder makes of R images, after its last norm, on the CPU.

    Attributes:
        cls: `[R, C]` float32, the class token; `mean` again where the encoder has none.
        mean: `[R, C]` float32, the mean of the patch tokens.
        tokens: `[R, N, C]` float16, the patch tokens in raster order, or None.
        labels: `[R]` int64.
    """

    cls: Tensor
    mean: Tensor
    tokens: Tensor | None
    labels: Tensor

    def take(self, rows: Tensor) -> Features:
        """Those of the images `rows`, int64."""
        tokens = self.tokens[rows] if self.tokens is not None else None
        return Features(self.cls[rows], self.mean[rows], tokens, self.labels[rows])


@dataclass(frozen=True)
class Images:
    """The samples of some shards, and how to cut crops from them.

    Attributes:
        table: which samples.
        name: what to call them on the terminal; "" shows nothing there.
        image_size: side of the crops, px.
        centre: share of the shorter side that a crop shows when features are taken.
        batch_size: crops at a time.
        threads: CPU threads that decode; None takes the machine's cores.
        ranks: this rank; crops end up on its device.
    """

    table: SampleTable
    name: str
    image_size: int
    centre: float
    batch_size: int
    threads: int | None
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """What the crops are on."""
        return self.ranks.device

    def __len__(self) -> int:
        return len(self.table)

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(self.table.labels.max()) + 1

    def crops(
        self,
        view: View | None = None,
        *,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        own_share: bool = False,
    ) -> Iterator[CropBatch]:
        """Every image once an epoch.

        Args:
            view: which part of each; its centre if none is given.
            shuffle: draw them at random, else in the order of the shards.
            seed: of shuffle and view.
            own_share: only the images of this rank; together the ranks read all.
        """
        config = LoaderConfig(
            batch_size=self.batch_size,
            image_size=self.image_size,
            view=view or CentreView(self.centre),
            shuffle_buffer=LoaderConfig.shuffle_buffer if shuffle else 0,
            threads=self.threads,
        )
        loader = CropLoader(
            self.table,
            config,
            drop_last=False,
            rank=self.ranks.rank if own_share else 0,
            world_size=self.ranks.world_size if own_share else 1,
            device=self.device,
            seed=seed,
        )
        with tqdm(
            total=len(self) * epochs // loader.world_size,
            desc=self.name,
            unit=" images",
            mininterval=1,
            disable=not self.name,
        ) as bar:
            for _ in range(epochs):
                for crops in loader:
                    yield crops
                    bar.update(len(crops.rows))

    def features(
        self, encoder: VisionTransformer, *, tokens: bool = False, stop: Stop | None = None
    ) -> Features:
        """Run every image through an encoder, once, row by row as the table.

        Args:
            encoder: frozen, in eval mode, on the images' device.
            tokens: keep the patch tokens too: N x C x 2 bytes an image.
            stop: of the run that waits for them.

        Raises:
            FloatingPointError: some are no numbers.
            Stopped: the run was asked to stop.
        """
        count, width = len(self), encoder.embed_dim
        cls, mean = torch.empty(count, width), torch.empty(count, width)
        kept = torch.empty(
            count if tokens else 0, encoder.patch_embed.num_patches, width, dtype=torch.float16
        )
        with torch.inference_mode():
            for crops in self.crops():
                if stop:
                    stop.check()
                every = encoder.forward_features(normalise_images(crops.images)).float()
                patches = every[:, encoder.num_prefix_tokens :]
                for pooled, found in zip((cls, mean), pool(encoder, every), strict=True):
                    pooled[crops.rows] = found.cpu()
                if tokens:
                    kept[crops.rows] = patches.half().cpu()
        bad = ~(cls.isfinite().all(1) & mean.isfinite().all(1))
        if bad.any():
            first = self.table.key(int(bad.nonzero()[0]))
            raise FloatingPointError(
                f"the encoder's features of {int(bad.sum())} images, {first} the first, are no "
                "numbers: its weights ran away; take an earlier checkpoint of the run"
            )
        return Features(cls, mean, kept if tokens else None, self.table.labels)


def pool(encoder: VisionTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Class token and mean of the patches, `[B, C]` each, of an encoder's tokens `[B, P+N, C]`.

    Without a class token the mean stands for both. A fine-tuned encoder's last norm may come after
    the pooling.
    """
    mean = encoder.fc_norm(tokens[:, encoder.num_prefix_tokens :].mean(1))
    return (encoder.fc_norm(tokens[:, 0]) if encoder.has_class_token else mean), mean


def open_images(options: Evaluation, encoder: VisionTransformer, name: str, ranks: Ranks) -> Images:
    """The images of `--train` or `--val`, as that encoder takes them."""
    size = encoder.patch_embed.img_size[0]
    cache = ScoreCache(options.cache, create=True)
    samples = ranks.share(lambda: load_samples(getattr(options, name), cache))
    return Images(
        table=stage_shards(samples, cache, options.stage, show=ranks.is_main),
        name=name,
        image_size=size,
        centre=default_centre(size) if options.centre is None else options.centre,
        batch_size=options.batch_size,
        threads=options.threads,
        ranks=ranks,
    )


def default_centre(image_size: int) -> float:
    """Share of the shorter side that is shown at this size, px, unless said otherwise."""
    return 0.875 if image_size > 64 else 1.0


def require_labels(*sets: Images) -> None:
    """Refuse images without a class, of one that nobody numbers so high, or all of one; the first
    set is learned from.

    Raises:
        ValueError: names the first of them.
    """
    for images in sets:
        missing = (images.table.labels < 0).nonzero()
        if len(missing):
            raise UserError(
                f"{images.table.key(int(missing[0]))} and {len(missing) - 1} more samples have no "
                "class; this evaluation needs a <key>.cls beside every image"
            )
        highest = int(images.table.labels.argmax())
        if images.classes > _MOST_CLASSES:
            raise UserError(
                f"{images.table.key(highest)} is of class {images.classes - 1}; classes are "
                f"numbered from 0 to {_MOST_CLASSES - 1} at most, without gaps as far as possible"
            )
    learned = sets[0].table.labels.unique()
    if len(learned) == 1:
        raise UserError(
            f"{sets[0].table.key(0)} and all other samples beside it are of class {int(learned)}: "
            "an evaluation learns from images of two classes at least"
        )
    for images in sets[1:]:
        warn_of_unlearned(images, learned, images.table.labels.unique())


def warn_of_unlearned(images: Images, learned: Tensor, tested: Tensor) -> None:
    """Say that some of the classes to test, int64, are none of those learned.

    Raises:
        UserError: none of them is.
    """
    lacking = tested[~torch.isin(tested, learned)].tolist()
    if len(lacking) == len(tested):
        raise UserError(
            f"no class of --{images.name} is among those of --train, so every answer would be wrong"
        )
    if lacking and images.ranks.is_main:
        named = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
        print(
            f"warning: {len(lacking)} of the {len(tested)} classes of --{images.name} ({named}) "
            "are not among those of --train: every answer on them is wrong",
            file=sys.stderr,
        )


def top1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Share of right predictions, both `[R]` int64, in [0, 1]."""
    metric = MulticlassAccuracy(classes, average="micro")
    return float(metric(predicted, labels))


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent images (the binomial's)."""
    return (share * (1 - share) / count) ** 0.5
