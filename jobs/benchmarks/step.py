"""Time, FLOPs and memory of training steps, and what each signal adds to one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

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
_FAMT = "--recipe famt --frequency.source cached"  # what is refreshed is read like it
_OFF = "--recipe famt --frequency.source off --attention.source off"


@dataclass(frozen=True)
class Step(BenchmarkOptions):
    """Time, FLOPs and, on a GPU, memory of FAMT's training steps, beside this code's plain ones.

    A step is the training's own, on one batch of crops: signals, sampling, forward, backward and
    AdamW. A disturbed run shows in the fastest steps' ratio (`ratio_of_fastest`), which then
    differs from the medians'.
    """

    rounds: Annotated[int, Ge(1)] = 5
    """steps that each rival is measured for"""

    def run(self) -> Iterator[Report]:
        rivals = {
            "famt": (_FAMT, _MAE),
            "famt, self decoder, all predicted": (
                f"{_FAMT} --decoder self --join.predicted-share 1",
                _MAE,
            ),
            "famt, all predicted": (f"{_FAMT} --join.predicted-share 1", _MAE),
            "uniform": ("--recipe uniform", _MAE),
            "famt-simmim": ("--recipe famt-simmim --frequency.source cached", _SIMMIM),
        }
        yield from _compare("step", self, self.rounds, rivals)


@dataclass(frozen=True)
class Attention(BenchmarkOptions):
    """Time of whole FAMT steps with a signal, beside those without.

    `ms_of_signals`, what the signals' own stage takes, tells more than the ratio where that is
    lost in the noise; `ms_of_join` is that of sampling and gathering patches. Rolling attention
    refreshes a part of each batch a step, at half the crops' side or whole, live attention looks at
    every crop; `seen` and `errors` keep what the step itself gives, `cached` reads the cache. The
    last line has token frequency and attention of every crop computed in the step, against a score
    that is joined from the cache.
    """

    every: Annotated[int, Ge(1)] = AttentionConfig.every
    """rolling attention refreshes 1/every of a batch"""
    rounds: Annotated[int, Ge(1)] = 5
    """steps that each rival is measured for"""

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
    """A line for each rival, by the options of its run and of the one that bounds it."""
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
            image = 1000 / options.batch_size  # from seconds of a batch to ms of an image
            yield {
                **measure.line(
                    benchmark,
                    f"ms an image of a step of {name}, {options.setting}",
                    image * statistics.median(seconds["own"]),
                    f"ms an image of a step by {bound}",
                    image * statistics.median(seconds["bound"]),
                ),
                "ratio_of_fastest": round(min(seconds["own"]) / min(seconds["bound"]), 3),
                "ms_of_signals": round(image * stages["signals"] / steps, 3),
                "ms_of_join": round(image * stages["join"] / steps, 3),
                "gflop": round(flops / options.batch_size / 1e9, 2),
                "flop_ratio": round(flops / plain_flops, 3),
                **peak,
            }


def _attention(*shapes: Any, **_: Any) -> int:
    query, key, value, *_others = shapes
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(*shapes: Any, **_: Any) -> int:
    out, query, key, value, *_others = shapes
    return int(sdpa_backward_flop_count(out, query, key, value))


# torch's own counter knows the attentions of GPUs alone.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(steps: Steps) -> int:
    """Of the matrix products and attentions of a step's signals, forward and backward pass."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        steps.accumulate()
    steps.run.update()
    return int(counter.get_total_flops())


def _peak(steps: Steps) -> int:
    """MB that a step adds on the GPU at its peak to weights, optimiser and what else is there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps.step()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6)
