"""Time and memory of a training step, beside plain MAE's."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from tqdm import tqdm

from famt.jobs.benchmarks import measure
from famt.jobs.benchmarks.measure import Report
from famt.methods import METHODS
from famt.models import MODELS, Decoder
from famt.pipeline.options import Checked
from famt.sampling import predict_some, sample_patches
from famt.units import split_of_patches


@dataclass(frozen=True)
class Step(Checked):
    """Time and peak memory of FAMT's training steps, beside this code's own plain steps.

    `famt self` and `famt cross` mask 45 % and throw 40 %, under either decoder; `uniform`, the
    control's, throws 45 % and predicts half of the masked, under the cross decoder; `mae self`
    masks 75 %. `famt simmim` masks 44 % and throws 26 %, `simmim` masks 60 %, of squares of
    2 x 2. The time is a whole step: forward, backward and AdamW. A disturbed run shows in the
    fastest steps' ratio (`ratio_of_fastest`), which then differs from the medians'.
    """

    model: Literal[tuple(MODELS)] = "vit_base"  # type: ignore[valid-type]
    """which model"""
    batch_size: Annotated[int, Ge(1)] = 16
    """images a step"""
    rounds: Annotated[int, Ge(1)] = 5
    """steps that each rival is measured for"""
    threads: Annotated[int, Ge(1)] = 2
    """CPU threads"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast"""
    device: Literal["cpu", "cuda"] = "cpu"
    """what to compute on"""

    def run(self) -> Iterator[Report]:
        names = ["uniform", "famt self", "famt cross", "famt simmim"]
        # On a CPU a process each, and before this one holds a model: what one rival frees helps no
        # other. A GPU's peak is counted in tensors.
        memory = {
            name: self._memory(name) for name in tqdm([*names, "mae self", "simmim"], desc="memory")
        }
        yield from self.times("step", names)
        for name in names:
            bound = RIVALS[name].bound
            yield {
                **measure.line(
                    "step",
                    "MB that a step adds at its peak to weights, gradients and optimiser, "
                    f"{name}, {self._setting}",
                    memory[name].added / 1e6,
                    f"MB of {bound}",
                    memory[bound].added / 1e6,
                ),
                "whole_mb": {n: round(memory[n].whole / 1e6) for n in (name, bound)},
                "whole_ratio": round(memory[name].whole / memory[bound].whole, 3),
            }

    def times(self, benchmark: str, names: list[str]) -> Iterator[Report]:
        """A line each of `RIVALS`, all of them and their bounds taking turns."""
        torch.set_num_threads(self.threads)
        rivals = {
            name: _Rival(name, self)
            for name in dict.fromkeys([*names, *(RIVALS[name].bound for name in names)])
        }
        flops = {name: rival.flops() for name, rival in rivals.items()}
        seconds = measure.seconds({name: rival.step for name, rival in rivals.items()}, self.rounds)
        median = {name: statistics.median(each) for name, each in seconds.items()}
        for name in names:
            bound = RIVALS[name].bound
            yield {
                **measure.line(
                    benchmark,
                    f"ms an image of a step of {name}, {self._setting}",
                    1000 * median[name] / self.batch_size,
                    f"ms an image of a step of {bound}",
                    1000 * median[bound] / self.batch_size,
                ),
                "ratio_of_fastest": round(min(seconds[name]) / min(seconds[bound]), 3),
                "flop_ratio": round(flops[name] / flops[bound], 3),
                "gflop": {n: round(flops[n] / self.batch_size / 1e9, 2) for n in (name, bound)},
                "gflop_per_second": {
                    n: round(flops[n] / median[n] / 1e9, 1) for n in (name, bound)
                },
            }

    @property
    def _setting(self) -> str:
        return (
            f"{self.model}, {self.precision}, {self.device}, batch {self.batch_size}, "
            f"{self.threads} threads"
        )

    def _memory(self, name: str) -> _Memory:
        if self.device == "cuda":
            return _step_memory(name, self)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh_process:
            return fresh_process.submit(_step_memory, name, self).result()


@dataclass(frozen=True)
class _Setup:
    """What a rival trains, and whose step it is held against."""

    bound: str
    decoder: Decoder = "self"
    method: str = "mae"
    mask_ratio: float = 0.45
    throw_ratio: float = 0.40
    predicted_share: float = 1.0


RIVALS: dict[str, _Setup] = {
    "mae self": _Setup("mae self", mask_ratio=0.75, throw_ratio=0.0),
    "uniform": _Setup("mae self", "cross", throw_ratio=0.45, predicted_share=1 / 2),
    "famt self": _Setup("mae self"),
    "famt cross": _Setup("mae self", "cross"),
    "famt cross that predicts 1/2": _Setup("mae self", "cross", predicted_share=1 / 2),
    "famt cross that predicts 1/3": _Setup("mae self", "cross", predicted_share=1 / 3),
    "simmim": _Setup("simmim", method="simmim", mask_ratio=0.6, throw_ratio=0.0),
    "famt simmim": _Setup("simmim", method="simmim", mask_ratio=0.44, throw_ratio=0.26),
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


class _Rival:
    """A model, its optimiser and a batch of made-up patches."""

    def __init__(self, name: str, options: Step) -> None:
        setup = RIVALS[name]
        method = METHODS[setup.method]
        sizes = dataclasses.replace(MODELS[options.model], decoder=setup.decoder, **method.defaults)
        device = torch.device(options.device)
        self._autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=options.precision == "bf16"
        )
        self._model = method(sizes).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), 1e-4, fused=True)
        weights = torch.ones(options.batch_size, (sizes.grid // sizes.unit) ** 2, device=device)
        split = sample_patches(weights, setup.mask_ratio, setup.throw_ratio)
        split = predict_some(split_of_patches(split, sizes.unit), setup.predicted_share)
        values = sizes.patch_size**2 * 3
        visible = torch.randn(*split.visible.shape, values, device=device)
        masked = torch.randn(*split.predicted.shape, values, device=device)
        self._batch = visible, masked, split

    def accumulate(self) -> None:
        """Add a batch's gradients to those that are there."""
        with self._autocast():
            loss = self._model(*self._batch)
        loss.backward()

    def step(self) -> None:
        """A training step, waited for."""
        self.accumulate()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def flops(self) -> int:
        """Of the matrix products and attentions of a forward and a backward pass."""
        with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
            self.accumulate()
        self._optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


@dataclass(frozen=True)
class _Memory:
    """Peaks in bytes. On a CPU `whole` is the process's, its libraries included; on a GPU it is
    what torch allocated there."""

    whole: int
    """in a training step"""
    added: int
    """by forward and backward, to what is held where gradients lie ready to be added to"""


def _step_memory(name: str, options: Step) -> _Memory:
    """On a CPU this runs in a process of its own."""
    if options.device == "cpu":
        # glibc then maps each tensor by itself, so that memory which is freed counts no more.
        map_from_bytes = -3  # M_MMAP_THRESHOLD of <malloc.h>
        ctypes.CDLL(None).mallopt(map_from_bytes, 1 << 16)
    torch.set_num_threads(options.threads)
    rival = _Rival(name, options)
    peak = _peak_of_cuda if options.device == "cuda" else _peak_of_process
    rival.step()  # allocates the optimiser's moments
    whole, _ = peak(rival.step)
    rival.accumulate()
    during, before = peak(rival.accumulate)
    return _Memory(whole, during - before)


def _peak_of_cuda(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes allocated on the GPU: most while working, and before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated(), before


def _peak_of_process(work: Callable[[], None]) -> tuple[int, int]:
    """Bytes resident in this process: most while working, and before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = measure.resident_bytes()
    work()
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024, before
