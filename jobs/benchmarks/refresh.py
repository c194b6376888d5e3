"""How fast maps are made anew with the encoder of a run, and what that costs a training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from timm.models.vision_transformer import VisionTransformer

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.training import training, unweighed
from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline import storage
from famt.pipeline.model_scores import model_maps
from famt.pipeline.options import Checked
from famt.pipeline.refresh import score_images
from famt.pipeline.scores import ModelScoreSpec, ScoreSpec, encoder_digest
from famt.pipeline.table import SampleTable


@dataclass(frozen=True)
class Refresh(Checked):
    """Images/s of scoring shards with an encoder, beside its bare forward; its cost in epochs.

    The bound gives the same scores of tensors that are ready in memory.
    """

    shards: list[str] = field(default_factory=list)
    """tars to measure on; the first is used"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    kind: str = "frequency_attention"
    """which score"""
    images: Annotated[int, Ge(1)] = 128
    """photos of the made-up shard, where none is given"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images that are scored at a time"""
    step_batch_size: Annotated[int, Ge(1)] = 16
    """images of the training step that the cost is held against"""
    rounds: Annotated[int, Ge(1)] = 3
    """times that each rival is measured"""
    threads: Annotated[int, Ge(1)] = 2
    """CPU threads, for the encoder as for decoding"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the step that the cost is held against; bf16 computes under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """what to compute on"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(self.threads)
        sizes = MODELS[self.model]
        encoder = MaskedAutoencoder(sizes).encoder.eval().to(self.device)
        spec = ModelScoreSpec(
            self.kind,
            sizes.grid,
            sizes.image_size,
            encoder_digest(encoder.state_dict()),
            precision=self.precision,
        )
        given = storage.expand(self.shards)[:1] if self.shards else []
        with (
            measure.scored(given, ScoreSpec(), self.images) as (urls, cache),
            training(
                unweighed(
                    urls,
                    cache,
                    self.model,
                    self.step_batch_size,
                    self.threads,
                    self.device,
                    self.precision,
                )
            ) as steps,
        ):
            count = len(steps.run.samples)
            taken = measure.seconds(
                {
                    "refresh": self._refresh(encoder, steps.run.samples, spec),
                    "forward": self._forward(encoder, spec, count),
                    "step": steps.step,
                },
                self.rounds,
            )
        median = {name: statistics.median(each) for name, each in taken.items()}
        refreshed = count / median["refresh"]
        setting = (
            f"{self.model}, {self.kind}, {self.device}, batch {self.batch_size}, "
            f"{self.threads} threads"
        )
        yield measure.line(
            "refresh",
            f"images/s of refreshed maps, {setting}",
            refreshed,
            "images/s of the bare forward on tensors in memory",
            count / median["forward"],
        )
        yield measure.line(
            "refresh",
            f"seconds to refresh the maps of 1,000 images, {setting}",
            1000 / refreshed,
            f"seconds to train on them for an epoch, at batch {self.step_batch_size}",
            1000 * median["step"] / self.step_batch_size,
        )

    def _refresh(
        self, encoder: VisionTransformer, samples: SampleTable, spec: ModelScoreSpec
    ) -> Callable[[], None]:
        def work() -> None:
            score_images(
                encoder,
                samples,
                [spec],
                batch_size=self.batch_size,
                threads=self.threads,
                device=torch.device(self.device),
            )

        return work

    def _forward(
        self, encoder: VisionTransformer, spec: ModelScoreSpec, count: int
    ) -> Callable[[], None]:
        ready = torch.randn(
            min(count, self.batch_size), 3, spec.image_size, spec.image_size, device=self.device
        )

        def work() -> None:
            for first in range(0, count, self.batch_size):
                model_maps([spec], encoder, ready[: count - first])

        return work
