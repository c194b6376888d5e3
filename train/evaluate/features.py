"""What evaluators share: labelled images, their features under a frozen encoder, and accuracy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.patches import normalise_images
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import SampleTable, load_samples
from famt.pipeline.loading.loader import CropBatch, CropLoader
from famt.pipeline.loading.stage import stage_shards
from famt.pipeline.options import CentreView, LoaderConfig, View
from famt.pipeline.progress import progress_bar
from famt.train.distributed import Ranks
from famt.train.evaluate.evaluation import EncoderOptions
from famt.train.stop import Stop

_MOST_CLASSES = 100_000  # ImageNet-21k has 21,841; a classifier has a row for each

Value = float | int | str
Results = Iterator[tuple[str, Value]]
"""what an evaluator yields: values by name"""


@dataclass(frozen=True)
class Features:
    """Features of R images after the encoder's last norm, on the CPU.

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
        """The features of the images `rows`, int64."""
        tokens = self.tokens[rows] if self.tokens is not None else None
        return Features(self.cls[rows], self.mean[rows], tokens, self.labels[rows])


@dataclass(frozen=True)
class Images:
    """Samples of some shards, and how to cut crops from them.

    Attributes:
        table: the samples.
        name: label of the progress bar; "" shows none.
        image_size: side of the crops, px.
        centre: side of the central crop for features, as a share of the image's shorter side.
        batch_size: crops per batch.
        threads: CPU threads that decode; None takes this rank's share of the cores.
        ranks: this rank, whose device gets the crops.
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
        """Device of the crops."""
        return self.ranks.device

    def __len__(self) -> int:
        return len(self.table)

    @property
    def classes(self) -> int:
        """Number of classes; see `class_count`."""
        return class_count(self.table.labels)

    def crops(
        self,
        view: View | None = None,
        *,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        own_share: bool = False,
    ) -> Iterator[CropBatch]:
        """Crops of every image, once per epoch.

        Args:
            view: which part of an image to show; the centre if not given.
            shuffle: random order instead of that of the shards.
            seed: of shuffling and of random views.
            own_share: only this rank's images; all ranks together read every image.
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
        with progress_bar(
            total=len(self) * epochs // loader.world_size,
            desc=self.name,
            unit=" images",
            disable=not self.name,
        ) as bar:
            for _ in range(epochs):
                for crops in loader:
                    yield crops
                    bar.update(len(crops.rows))

    def features(
        self, encoder: VisionTransformer, *, tokens: bool = False, stop: Stop | None = None
    ) -> Features:
        """Features of every image, in the order of the table.

        Args:
            encoder: in eval mode, on the images' device.
            tokens: keep the patch tokens too, N x C x 2 bytes per image.
            stop: of the run that waits for the features.

        Raises:
            FloatingPointError: some features are not finite.
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
                f"the encoder's features of {int(bad.sum())} images, {first} the first, are not "
                "finite: the training diverged; use an earlier checkpoint of the run"
            )
        return Features(cls, mean, kept if tokens else None, self.table.labels)


def pool(encoder: VisionTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Class token and mean of the patches, `[B, C]` each, of an encoder's tokens `[B, P+N, C]`.

    Without a class token the mean stands for both. A fine-tuned encoder's last norm may come after
    the pooling.
    """
    mean = encoder.fc_norm(tokens[:, encoder.num_prefix_tokens :].mean(1))
    return (encoder.fc_norm(tokens[:, 0]) if encoder.has_class_token else mean), mean


def open_images(
    options: EncoderOptions, encoder: VisionTransformer, name: str, ranks: Ranks
) -> Images:
    """The images of an option's shards, such as --train's (`name`), at the encoder's size."""
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
    """Default of `--centre` for crops of this size, px."""
    return 0.875 if image_size > 64 else 1.0


def require_labels(*sets: Images) -> None:
    """Refuse sets with unlabelled images or absurd labels, and a training set of a single class.

    Args:
        sets: the first is the training set.

    Raises:
        UserError: names the first such image.
    """
    for images in sets:
        missing = (images.table.labels < 0).nonzero()
        if len(missing):
            raise UserError(
                f"{images.table.key(int(missing[0]))} and {len(missing) - 1} more samples have no "
                "class; this evaluation needs a <key>.cls for every image"
            )
        highest = int(images.table.labels.argmax())
        if images.classes > _MOST_CLASSES:
            raise UserError(
                f"{images.table.key(highest)} has class {images.classes - 1}; classes must be "
                f"numbered from 0 to {_MOST_CLASSES - 1} at most, preferably without gaps"
            )
    learned = sets[0].table.labels.unique()
    if len(learned) == 1:
        raise UserError(
            f"{sets[0].table.key(0)} and all other training samples have class {int(learned)}; an "
            "evaluation needs at least two classes"
        )
    for images in sets[1:]:
        warn_of_unlearned(images, learned, images.table.labels.unique())


def warn_of_unlearned(images: Images, learned: Tensor, tested: Tensor) -> None:
    """Warn of tested classes, int64, that are not among the learned ones.

    Raises:
        UserError: none of them is.
    """
    lacking = tested[~torch.isin(tested, learned)].tolist()
    if len(lacking) == len(tested):
        raise UserError(
            f"--{images.name} shares no class with --train, so every answer would be wrong"
        )
    if lacking and images.ranks.is_main:
        named = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
        print(
            f"warning: {len(lacking)} of the {len(tested)} classes of --{images.name} ({named}) "
            "are missing in --train; their images count as wrong",
            file=sys.stderr,
        )


def class_count(*labels: Tensor) -> int:
    """Number of classes in sets of labels, int64: one more than the largest label."""
    return 1 + max(int(each.max()) for each in labels)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Share of correct predictions, in [0, 1]; both arguments `[R]` int64."""
    return float((predicted == labels).double().mean())


def standard_error(share: float, count: int) -> float:
    """Binomial standard error of a share of `count` independent images."""
    return (share * (1 - share) / count) ** 0.5
