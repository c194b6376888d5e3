"""Time, FLOPs and memory of training steps, and what each signal adds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.jobs.benchmarks.training import BenchmarkOptions, Steps, open_steps
from famt.models import MODELS
from famt.train.signals.config import AttentionConfig

_MAE, _SIMMIM = "--recipe mae", "--recipe simmim"
_FAMT = "--recipe famt --frequency.source cached"  # refreshed maps are read alike
_OFF = "--recipe famt --frequency.source off --attention.source off"


@dataclass(frozen=True)
class Step(BenchmarkOptions):
    """Time, FLOPs and, on a GPU, memory of FAMT's training steps against plain MAE and SimMIM.

    A step is one of a training run, on one batch of crops: signals, sampling, forward, backward and
    AdamW. `ratio_of_fastest` compares the fastest steps; if it differs from `ratio`, something
    disturbed the measurement.
    """

    rounds: Annotated[int, Ge(1)] = 5
    """timed steps of each rival"""

    def run(self) -> Iterator[Report]:
        all_predicted = f"{_FAMT} --join.predicted-share 1"
        rivals = {
            "famt": (_FAMT, _MAE),
            "famt, self decoder, all predicted": (f"{all_predicted} --decoder self", _MAE),
            "famt, all predicted": (all_predicted, _MAE),
            "uniform": ("--recipe uniform", _MAE),
            "famt-simmim": ("--recipe famt-simmim --frequency.source cached", _SIMMIM),
        }
        yield from _compare("step", self, self.rounds, rivals)


@dataclass(frozen=True)
class Attention(BenchmarkOptions):
    """Time of FAMT steps with one signal each, against a step without signals.

    `ms_of_signals` is the time of the signals' own stage, more precise than the ratio where noise
    hides the difference; `ms_of_join` is that of sampling and gathering patches. The last line
    computes token frequency and attention of every crop in the step, against the cached score.
    """

    every: Annotated[int, Ge(1)] = AttentionConfig.every
    """rolling attention refreshes 1/every of a batch"""
    rounds: Annotated[int, Ge(1)] = 5
    """timed steps of each rival"""

    def run(self) -> Iterator[Report]:
        rolling = f"--attention.source rolling --attention.every {self.every}"
        whole = MODELS[self.model].image_size
        signals = {
            "cached frequency": "--frequency.source cached",
            "rolling attention": rolling,
            "rolling attention at full size": f"{rolling} --attention.image-size {whole}",
            "live attention": "--attention.source live",
            "seen attention": "--attention.source seen",
            "errors": "--hardness.source errors",
        }
        rivals = {name: (f"{_OFF} {options}", _OFF) for name, options in signals.items()}
        rivals["frequency and attention in the step"] = (
            f"{_OFF} --attention.source live --attention.kind frequency_attention",
            f"{_OFF} --frequency.source cached",
        )
        yield from _compare("attention", self, self.rounds, rivals)


def _compare(
    benchmark: str, options: BenchmarkOptions, rounds: int, rivals: dict[str, tuple[str, str]]
) -> Iterator[Report]:
    """A line per rival; `rivals` holds its options of `famt pretrain`, and those of its bound."""
    torch.set_num_threads(options.threads)
    with measure.scored(options.shards, options.photos) as (urls, cache):
        for name, (own, bound) in rivals.items():
            with (
                open_steps(options.config(urls, cache.url, own)) as rival,
                open_steps(options.config(urls, cache.url, bound)) as plain,
            ):
                flops, plain_flops = count_flops(rival), count_flops(plain)
                for each in (rival, plain):
                    each.step()
                    each.run.clock.read()
                seconds = measure.seconds({"own": rival.step, "bound": plain.step}, rounds)
                stages, steps = rival.run.clock.read(), rounds + 1
                peak = {"mb_at_peak": _peak(rival)} if options.device == "cuda" else {}
            image = 1000 / options.batch_size  # ms of an image per second of a batch
            own_ms, bound_ms = (image * statistics.median(seconds[each]) for each in seconds)
            unit = f"ms an image of a step of {name}, {options.setting}"
            against = f"ms an image of a step with {bound}"
            yield {
                **measure.line(benchmark, unit, own_ms, against, bound_ms),
                "ratio_of_fastest": round(min(seconds["own"]) / min(seconds["bound"]), 3),
                "ms_of_signals": round(image * stages["signals"] / steps, 3),
                "ms_of_join": round(image * stages["join"] / steps, 3),
                "gflop": round(flops / options.batch_size / 1e9, 2),
                "flop_ratio": round(flops / plain_flops, 3),
                **peak,
            }


# torch's own counter knows attention on GPUs only.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda *shapes, **_: sdpa_flop_count(*shapes[:3])
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}


def count_flops(steps: Steps) -> int:
    """FLOPs of matrix products and attention in signals, forward and backward pass of a step."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        steps.accumulate()
    steps.run.update()
    return int(counter.get_total_flops())


def _peak(steps: Steps) -> int:
    """MB that a step adds at its peak to the GPU memory in use before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps.step()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)
