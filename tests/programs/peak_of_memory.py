"""The peak of work that takes 64 MiB three times, never two at once; printed in MiB."""

import torch

from famt.jobs.benchmarks.step import _peak_of_process


def work() -> None:
    for _ in range(3):
        torch.ones(16 << 20)


_peak_of_process(lambda: torch.ones(64 << 20))  # an earlier, higher peak is forgotten
during, before = _peak_of_process(work)
print((during - before) / 2**20)
