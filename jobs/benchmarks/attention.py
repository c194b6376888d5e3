"""What the signals of a training step cost."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge

from famt.frequency import pixel_frequency
from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.step import Step
from famt.jobs.benchmarks.training import Steps, training, unweighed
from famt.models import MODELS
from famt.pipeline.loader import CropBatch
from famt.pipeline.options import Checked
from famt.pipeline.scores import ScoreSpec
from famt.train.signals.attention import Live
from famt.train.signals.config import AttentionConfig, FrequencyConfig, HardnessConfig
from famt.train.signals.signal import Signal


@dataclass(frozen=True)
class Attention(Checked):
    """Time of whole FAMT steps with a signal, beside those without; and the share of the join.

    `rolling` refreshes a part of each batch a step, at half the crops' side or whole, `live`
    looks at every crop; `seen` and `errors` keep what the step itself gives. `cached` joins the
    pixel score from the cache; `computed`, beside it, takes pixel score, token frequency and
    attention of every crop in the step. All steps are the training's own, on one batch of crops;
    `ms_of_its_own`, what a signal's own stage took of them, tells more than the ratio where that is
    lost in the noise. The last lines hold steps that decode
    a share of the masked patches against plain MAE's.
    """

    shards: list[str] = field(default_factory=list)
    """tars to take crops from"""
    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    batch_size: Annotated[int, Ge(1)] = 16
    """images a step"""
    every: Annotated[int, Ge(1)] = AttentionConfig.every
    """rolling attention refreshes 1/every of a batch"""
    rounds: Annotated[int, Ge(1)] = 5
    """steps that each rival is measured for"""
    threads: Annotated[int, Ge(1)] = 2
    """CPU threads"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """what to compute on"""

    def run(self) -> Iterator[Report]:
        torch.set_num_threads(self.threads)
        with (
            measure.scored(self.shards, ScoreSpec()) as (urls, cache),
            training(
                unweighed(
                    urls,
                    cache,
                    self.model,
                    self.batch_size,
                    self.threads,
                    self.device,
                    self.precision,
                )
            ) as steps,
        ):
            agreement = self._agreement(steps)
            stages: dict[str, list[dict[str, float]]] = defaultdict(list)
            whole = steps.run.sizes.image_size
            slots: dict[str, dict[str, Any]] = {
                "off": {},
                "rolling": {"attention": AttentionConfig("rolling", every=self.every)},
                "rolling at full size": {
                    "attention": AttentionConfig("rolling", every=self.every, image_size=whole)
                },
                "live": {"attention": AttentionConfig("live")},
                "seen": {"attention": AttentionConfig("seen")},
                "errors": {"hardness": HardnessConfig("errors")},
                "cached": {"frequency": FrequencyConfig("cached")},
                "computed": {"attention": AttentionConfig("live", kind="frequency_attention")},
            }
            rivals = {
                name: self._stepper(
                    steps,
                    each,
                    stages[name],
                    [PixelScore(steps.run.sizes.grid)] if name == "computed" else [],
                )
                for name, each in slots.items()
            }
            taken = measure.seconds(rivals, self.rounds)
        ms = {
            name: 1000 * statistics.median(each) / self.batch_size for name, each in taken.items()
        }
        setting = (
            f"{self.model}, {self.precision}, {self.device}, batch {self.batch_size}, "
            f"{self.threads} threads"
        )
        for name in (each for each in slots if each != "off"):
            bound = "cached" if name == "computed" else "off"
            yield {
                **measure.line(
                    "attention",
                    f"ms an image of a step with {name}, {setting}",
                    ms[name],
                    f"ms an image of a step with signals {bound}",
                    ms[bound],
                ),
                "ratio_of_fastest": round(min(taken[name]) / min(taken[bound]), 3),
                "ms_of_its_own": round(self._ms(stages[name], "signals"), 3),
            }
        yield measure.line(
            "attention",
            f"ms an image of join and sampling, {setting}",
            self._ms(itertools.chain(*stages.values()), "join"),
            "ms an image of a step without signals",
            ms["off"],
        )
        yield agreement
        step = Step(
            self.model, self.batch_size, self.rounds, self.threads, self.precision, self.device
        )
        names = ["famt cross that predicts 1/2", "famt cross that predicts 1/3"]
        yield from step.times("attention", names)

    def _stepper(
        self,
        steps: Steps,
        slots: dict[str, Any],
        stages: list[dict[str, float]],
        added: list[Signal],
    ) -> Callable[[], None]:
        def work() -> None:
            steps.run.signals = [*steps.signals(**slots), *added]
            steps.step()
            for signal in steps.run.signals:
                signal.close(finished=False)
            stages.append(steps.run.clock.read())

        return work

    def _ms(self, stages: Iterable[dict[str, float]], stage: str) -> float:
        """Median time of a stage, ms an image."""
        return 1000 * statistics.median(each[stage] for each in stages) / self.batch_size

    def _agreement(self, steps: Steps) -> Report:
        """How alike full and half resolution rank the patches of the crops."""
        run, images = steps.run, steps.crops.images
        slot, half = AttentionConfig("live"), steps.run.sizes.image_size // 2
        full, low = (Live(slot, run.context, size).score(images) for size in (None, half))
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


class PixelScore(Signal):
    """The default pixel score of every crop, computed in the step at the size of the cache's."""

    name = "pixels"

    def __init__(self, grid: int) -> None:
        self._spec = ScoreSpec(grid=grid)

    def read(self, crops: CropBatch, step: int) -> torch.Tensor:
        spec = self._spec
        pixels = crops.images.permute(0, 3, 1, 2).float().div_(255)
        return pixel_frequency(F.adaptive_avg_pool2d(pixels, spec.size), spec.grid).flatten(1)
