"""Speed of refreshing score maps with the encoder of a run, and its cost in training time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.training import BenchmarkOptions, open_steps
from famt.pipeline.scores import ModelScoreSpec, encoder_digest
from famt.pipeline.scoring.model_scores import model_maps, score_images


@dataclass(frozen=True)
class Refresh(BenchmarkOptions):
    """Images/s of refreshing maps, against the bare forward pass; seconds, against an epoch.

    The forward pass computes the same scores of tensors in memory. `--batch-size` is that of the
    training step.
    """

    kind: str = "frequency_attention"
    """which score"""
    scored_at_once: Annotated[int, Ge(1)] = 32
    """images per forward pass"""
    rounds: Annotated[int, Ge(1)] = 3
    """timed turns of each rival"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(self.threads)
        with (
            measure.scored(self.shards, self.photos) as (urls, cache),
            open_steps(self.config(urls, cache.url, "--recipe uniform")) as steps,
        ):
            encoder, sizes = steps.run.model.encoder.eval(), steps.run.sizes
            digest = encoder_digest(encoder.state_dict())
            spec = ModelScoreSpec(
                self.kind, sizes.grid, sizes.image_size, digest, precision=self.precision
            )
            count = len(steps.run.samples)
            shape = (min(count, self.scored_at_once), 3, sizes.image_size, sizes.image_size)
            ready = torch.randn(shape, device=self.device)

            def refresh() -> None:
                score_images(
                    encoder, steps.run.samples, [spec], batch_size=self.scored_at_once,
                    threads=self.threads, device=torch.device(self.device),
                )  # fmt: skip

            def forward() -> None:
                for first in range(0, count, self.scored_at_once):
                    model_maps([spec], encoder, ready[: count - first])

            rivals = {"refresh": refresh, "forward": forward, "step": steps.step}
            taken = measure.seconds(rivals, self.rounds)
        median = {name: statistics.median(each) for name, each in taken.items()}
        setting, rate = f"{self.kind}, {self.setting}", count / median["refresh"]
        unit, bound = f"images/s of refreshed maps, {setting}", "images/s of the bare forward pass"
        yield measure.line("refresh", unit, rate, bound, count / median["forward"])
        unit = f"seconds to refresh the maps of 1,000 images, {setting}"
        epoch = 1000 * median["step"] / self.batch_size
        yield measure.line("refresh", unit, 1000 / rate, "seconds to train an epoch on them", epoch)
