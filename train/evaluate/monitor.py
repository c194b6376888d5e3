"""k-NN and a quick linear probe of the encoder in training, between epochs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from tqdm import tqdm

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.stage import stage_shards
from famt.train.config import Pretrain
from famt.train.distributed import Ranks
from famt.train.evaluate.classifiers import Setting, fit, part
from famt.train.evaluate.evaluators.probe import Probe
from famt.train.evaluate.features import (
    Features,
    Images,
    default_centre,
    require_labels,
    standard_error,
    top1,
)
from famt.train.evaluate.neighbours import predict
from famt.train.log import Log
from famt.train.stop import Stop, Stopped

_TESTED = 0.2  # share of the images to test on; k-NN and probe learn from the others


class Monitor:
    """Evaluates the encoder in training, for curves beside the loss.

    Training pauses meanwhile; the log says for how many seconds. A look that a stop interrupts is
    repeated on resume (not after an `--elastic` resume with other options, which starts at the next
    epoch). The monitor uses a copy of the weights and none of the training's random generators, so
    it does not change what is learned.

    Args:
        config: its `monitor` names labelled shards, a fifth of each class of which is tested.
        cache: score cache that knows the shards.
        ranks: the main rank.

    Raises:
        UserError: images without a class, or too few.
        CacheError: see `famt.pipeline.loading.dataset.load_samples`.
    """

    def __init__(self, config: Pretrain, cache: ScoreCache, ranks: Ranks) -> None:
        size = config.sizes.image_size
        self._images = Images(
            table=stage_shards(load_samples(config.monitor, cache), cache, config.stage),
            name="",
            image_size=size,
            centre=default_centre(size),
            batch_size=64,
            threads=config.threads,
            ranks=ranks,
        )
        require_labels(self._images)
        self._known, self._tested = part(self._images.table.labels, _TESTED, seed=0)
        with torch.random.fork_rng([]):  # its random weights are never used
            self._encoder = config.sizes.encoder().to(ranks.device).eval()

    def look(self, encoder: VisionTransformer, step: int, log: Log, stop: Stop) -> bool:
        """Evaluate the encoder; False if the run was asked to stop meanwhile.

        A failure is logged, and training goes on.
        """
        started = time.monotonic()
        self._encoder.load_state_dict(encoder.state_dict())
        try:
            features = self._images.features(self._encoder, stop=stop)
            values = dict(self._values(features, stop))
        except Stopped:
            return False
        except Exception as error:
            log.event(step, "monitor failed", tell=True, reason=repr(error))
            return True
        table = self._images.table
        tested, labels = len(self._tested), table.labels
        shares = [f"{values[name] * 100:.1f}" for name in ("knn_cls", "knn_mean")]
        spread = 100 * standard_error(values["knn_mean"], tested)
        classes = len(labels.unique())
        tqdm.write(
            f"step {step}: quick k-NN {' / '.join(shares)} % ± {spread:.1f} (class token / mean of "
            f"patches), tested on {tested} and learned from {len(table) - tested} images of "
            f"{classes} classes (chance: {100 / classes:.1f} %)",
            file=sys.stderr,
        )
        values["seconds"] = time.monotonic() - started
        log.found(step, "monitor", values, images=len(table), data=table.digest)
        return True

    def _values(self, features: Features, stop: Stop) -> Iterator[tuple[str, float]]:
        labels = features.labels
        device = self._images.device
        for pooling in ("cls", "mean"):
            every = getattr(features, pooling).to(device)
            known = labels[self._known].to(device)
            stop.check()
            found = predict(every[self._known], known, every[self._tested]).cpu()
            yield f"knn_{pooling}", top1(found, labels[self._tested])
        settings = [Setting("cls", 3e-2, 10.0), Setting("mean", 3e-2, 10.0)]
        stop.check()
        quick = Probe(checkpoint="", cache="", train=[], val=[], epochs=1, steps=200)
        classes = self._images.classes
        classifiers = fit(
            features, self._known, settings, quick, classes, 1, device, progress=False
        )
        predicted = classifiers.logits(features.take(self._tested), 1024, device).argmax(-1)
        for setting, found in zip(settings, predicted, strict=True):
            yield f"probe_{setting.pooling}", top1(found, labels[self._tested])
