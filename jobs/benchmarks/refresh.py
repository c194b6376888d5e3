"""How fast maps are made anew with the encoder of a run, and what that costs a training."""

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
from famt.pipeline.model_scores import model_maps
from famt.pipeline.refresh import score_images
from famt.pipeline.scores import ModelScoreSpec, encoder_digest


@dataclass(frozen=True)
class Refresh(BenchmarkOptions):
    """Images/s of scoring shards with an encoder, beside its bare forward; its cost in epochs.

    The bound gives the same scores of tensors that are ready in memory. `--batch-size` is that of
    the training step.
    """

    kind: str = "frequency_attention"
    """which score"""
    scored_at_once: Annotated[int, Ge(1)] = 32
    """images that are scored at a time"""
    rounds: Annotated[int, Ge(1)] = 3
    """times that each rival is measured"""

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
                    encoder,
                    steps.run.samples,
                    [spec],
                    batch_size=self.scored_at_once,
                    threads=self.threads,
                    device=torch.device(self.device),
                )

            def forward() -> None:
                for first in range(0, count, self.scored_at_once):
                    model_maps([spec], encoder, ready[: count - first])

            rivals = {"refresh": refresh, "forward": forward, "step": steps.step}
            taken = measure.seconds(rivals, self.rounds)
        median = {name: statistics.median(each) for name, each in taken.items()}
        rate = count / median["refresh"]
        yield measure.line(
            "refresh",
            f"images/s of refreshed maps, {self.kind}, {self.setting}",
            rate,
            "images/s of the bare forward on tensors in memory",
            count / median["forward"],
        )
        yield measure.line(
            "refresh",
            f"seconds to refresh the maps of 1,000 images, {self.kind}, {self.setting}",
            1000 / rate,
            "seconds to train on them for an epoch",
            1000 * median["step"] / self.batch_size,
        )
