"""Watching an encoder while it learns: k-NN and a quick probe, on a thread beside the steps."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from famt.models import ModelConfig
from pipeline.cache import ScoreCache
from pipeline.loader import CropBatch
from pipeline.table import load_samples
from train.distributed import Ranks
from train.evaluate.knn import predict
from train.evaluate.probe import Probe, Setting, fit, part
from train.evaluate.trunk import Features, Images, default_centre, require_labels, top1
from train.log import Log

_TESTED = 0.2  # share of the images that is tested; the others are neighbours, and train the probe


class Monitor:
    """Tells now and then what the encoder in training is worth, by curves beside the loss.

    It works on a copy of the weights, on a thread of the main rank, and draws nothing from the
    generators of the training, whose weights are the same with it and without. While it is busy
    the steps share the machine with it; each line in the log tells for how many seconds.

    Args:
        shards: labelled; a fifth of the images, drawn from every class, is tested.
        cache: that knows them.
        sizes: of the model in training.
        threads: CPU threads that decode; None takes the machine's cores.
        here: the main rank.

    Raises:
        ValueError: images without a class, or too few.
        CacheError: see `pipeline.table.load_samples`.
    """

    def __init__(
        self,
        shards: list[str],
        cache: ScoreCache,
        sizes: ModelConfig,
        threads: int | None,
        here: Ranks,
    ) -> None:
        self._stop = threading.Event()
        self._images = _Stoppable(
            table=load_samples(shards, cache),
            name="",
            image_size=sizes.image_size,
            centre=default_centre(sizes.image_size),
            batch_size=64,
            threads=threads,
            here=here,
            stop=self._stop,
        )
        require_labels(self._images)
        self._known, self._tested = part(self._images.table.labels, _TESTED, seed=0)
        with torch.random.fork_rng([]):  # the weights that are drawn here are never used
            self._encoder = sizes.encoder().to(here.device).eval()
        self._thread: threading.Thread | None = None

    def look(self, encoder: VisionTransformer, step: int, log: Log) -> None:
        """Begin to measure the encoder as it is; left out if the last look is not over."""
        if self._thread and self._thread.is_alive():
            log.event(step, "monitor left out", tell=True, reason="the last look is not over")
            return
        self._encoder.load_state_dict(encoder.state_dict())
        self._thread = threading.Thread(target=self._measure, args=(step, log), daemon=True)
        self._thread.start()

    def close(self, *, finished: bool) -> None:
        """Wait for the last look; if the run is not finished, give it up."""
        if not finished:
            self._stop.set()
        if self._thread:
            self._thread.join()

    def _measure(self, step: int, log: Log) -> None:
        started, device = time.monotonic(), self._images.device
        try:
            with _own_stream(device):
                values = dict(self._values(self._images.features(self._encoder)))
        except _StoppedError:
            return
        except Exception as error:  # training goes on without its curves
            log.event(step, "monitor failed", tell=True, reason=repr(error))
            return
        log.found(step, "monitor", {**values, "seconds": time.monotonic() - started})

    def _values(self, features: Features) -> Iterator[tuple[str, float]]:
        labels = features.labels
        classes, device = self._images.classes, self._images.device
        for pooling in ("cls", "mean"):
            every = getattr(features, pooling).to(device)
            known = labels[self._known].to(device)
            found = predict(every[self._known], known, every[self._tested]).cpu()
            yield f"knn_{pooling}", top1(found, labels[self._tested], classes)
        settings = [Setting("cls", 3e-2, 10.0), Setting("mean", 3e-2, 10.0)]
        quick = Probe(checkpoint="", cache="", train=[], val=[], epochs=1, steps=200)
        classifiers = fit(
            features, self._known, settings, quick, classes, 1, device, progress=False
        )
        predicted = classifiers.logits(features.take(self._tested), 1024, device).argmax(-1)
        for setting, found in zip(settings, predicted, strict=True):
            yield f"probe_{setting.pooling}", top1(found, labels[self._tested], classes)


class _StoppedError(Exception):
    """The training ends before a look is over."""


@dataclass(frozen=True)
class _Stoppable(Images):
    """Images whose reading can be given up."""

    stop: threading.Event

    def crops(self, *args: Any, **options: Any) -> Iterator[CropBatch]:
        for crops in super().crops(*args, **options):
            if self.stop.is_set():
                raise _StoppedError
            yield crops


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU a stream beside that of the steps, which goes on from what is in that one now."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
