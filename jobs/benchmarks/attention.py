"""What the attention of a training step costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from famt.models import MODELS
from jobs.benchmarks import measure
from jobs.benchmarks.measure import Report
from jobs.benchmarks.step import Step
from jobs.benchmarks.training import Training, training
from pipeline.loader import CropBatch
from pipeline.scores import ScoreSpec
from train.attention import LiveAttention, RollingAttention
from train.config import RollingConfig

Attend = Callable[[CropBatch, int], torch.Tensor | None]


@dataclass(frozen=True)
class Attention:
    """Time of whole FAMT steps with attention, beside those without; and the share of the join.

    `rolling` refreshes a part of each batch a step, `rolling low` on crops of half the side, `live`
    looks at every crop. All these steps are the training's own, on one batch of crops. The last
    lines hold steps that decode a share of the masked patches against plain MAE's.
    """

    shards: list[str] = field(default_factory=list)
    """tars to take crops from"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    batch_size: int = 16
    """images a step"""
    every: int = RollingConfig.every
    """rolling attention refreshes 1/every of a batch"""
    rounds: int = 5
    """steps that each rival is measured for"""
    threads: int = 2
    """CPU threads"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(self.threads)
        with (
            measure.scored(self.shards, ScoreSpec()) as (urls, cache),
            training(urls, cache, self.model, self.batch_size, self.threads) as steps,
        ):
            agreement = self._agreement(steps)
            joins: list[float] = []
            rivals = {
                name: self._stepper(steps, attend, joins)
                for name, attend in self._rivals(steps).items()
            }
            taken = measure.seconds(rivals, self.rounds)
        ms = {
            name: 1000 * statistics.median(each) / self.batch_size for name, each in taken.items()
        }
        setting = f"{self.model}, batch {self.batch_size}, {self.threads} threads"
        for name in ("rolling", "rolling low", "live"):
            yield {
                **measure.line(
                    "attention",
                    f"ms an image of a step, attention {name}, {setting}",
                    ms[name],
                    "ms an image of a step, attention off",
                    ms["off"],
                ),
                "ratio_of_fastest": round(min(taken[name]) / min(taken["off"]), 3),
            }
        yield measure.line(
            "attention",
            f"ms an image of join and sampling, {setting}",
            1000 * statistics.median(joins) / self.batch_size,
            "ms an image of a step, attention off",
            ms["off"],
        )
        yield agreement
        step = Step(self.model, self.batch_size, self.rounds, self.threads)
        names = ["famt cross that predicts 1/2", "famt cross that predicts 1/3"]
        yield from step.times("attention", names)

    def _rivals(self, steps: Training) -> dict[str, Attend | None]:
        live = LiveAttention(steps.run.model.encoder, steps.run.config.attention_score)
        return {
            "off": None,
            "rolling": self._rolling(steps, None),
            "rolling low": self._rolling(steps, steps.run.sizes.image_size // 2),
            "live": lambda crops, _: live(crops.images),
        }

    def _rolling(self, steps: Training, image_size: int | None) -> RollingAttention:
        run = steps.run
        live = LiveAttention(run.model.encoder, run.config.attention_score, image_size)
        config = RollingConfig(self.every, image_size)
        return RollingAttention(live, len(run.table), run.sizes.grid, config, run.here)

    def _stepper(
        self, steps: Training, attend: Attend | None, joins: list[float]
    ) -> Callable[[], None]:
        def work() -> None:
            steps.run.attend = attend
            steps.step()
            joins.append(steps.run.clock.read()["join"])

        return work

    def _agreement(self, steps: Training) -> Report:
        """How alike full and half resolution rank the patches of the crops."""
        run, images = steps.run, steps.crops.images
        sizes = (None, run.sizes.image_size // 2)
        full, low = (
            LiveAttention(run.model.encoder, run.config.attention_score, size)(images)
            for size in sizes
        )
        side = round(low.shape[1] ** 0.5)
        low = F.interpolate(low.view(-1, 1, side, side), run.sizes.grid, mode="bilinear")
        return measure.line(
            "attention",
            "rank correlation of attention scores at half and at full resolution, mean over crops, "
            f"{self.model} with random weights",
            statistics.mean(measure.rank_correlations(low.flatten(1), full)),
            "perfect agreement",
            1.0,
        )
