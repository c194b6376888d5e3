"""What a run left behind: its weights, and the lines of its log."""

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
