"""What runs and steps leave behind: weights, lines of a log, scores in a bank."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from famt.train import checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights by name of the last checkpoint in a run's folder."""
    return checkpoint.load(folder).model


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold tensors of the same names and values, to the last bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, none where there is no log yet."""
    path = folder / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    # A program that still writes may have the last one half way.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def log_points(folder: Path) -> list[dict[str, Any]]:
    """The log points among the lines of a run's log, which have a loss."""
    return [line for line in log_lines(folder) if "loss" in line]


def log_events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The events of a name among the lines of a run's log."""
    return [line for line in log_lines(folder) if line.get("event") == name]


def written_by_a_step(run):
    """The batch of a run's first step, and what its one signal, a banked one, writes of it:
    scores and whether each is known, `[B, N]`."""
    (signal,) = run.signals
    written = []
    signal.bank.write = lambda *what: written.append(what)
    batch = run.prepare(next(iter(run.loader)), 0)
    run.forward_backward(batch)
    signal.synchronise()
    ((views, scores, step, known),) = written
    assert views.rows.tolist() == batch.views.rows.tolist()
    assert step == 0
    return batch, scores, known
