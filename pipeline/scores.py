"""What a score is: its kind and parameters, and the id under which the cache keeps it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from famt.frequency import DEFAULT_KIND, PixelKind, pixel_frequency

_CODE_VERSION = 1  # raise it with any change that alters the numbers of an existing kind


@dataclass(frozen=True)
class ScoreSpec:
    """A kind of pixel score and all that its numbers depend on. Equal specs share cached maps."""

    kind: PixelKind = DEFAULT_KIND
    """which score; `python -m jobs.benchmark quality` compares them"""
    grid: int = 14
    """cells a side of a stored map, over the whole image"""
    pixels_per_cell: int = 4
    """images are squashed to this many pixels a cell before they are scored"""
    band: tuple[float, float] | None = None
    """(low, high) edges of the pass band in cycles per image side; the kind's own if left out"""

    @property
    def size(self) -> int:
        """Side in px of the square that images are squashed to."""
        return self.grid * self.pixels_per_cell

    def describe(self) -> dict[str, object]:
        """The spec spelled out, as JSON keeps it."""
        described = json.loads(json.dumps(dataclasses.asdict(self)))
        return {**described, "code_version": _CODE_VERSION}

    @classmethod
    def from_description(cls, described: dict[str, Any]) -> ScoreSpec | None:
        """The spec that `describe` spelled out, or None if other code's scores are meant."""
        values = dict(described)
        if values.pop("code_version", None) != _CODE_VERSION:
            return None
        if values["band"] is not None:
            values["band"] = tuple(values["band"])
        return cls(**values)

    @property
    def id(self) -> str:
        """Hash of kind, parameters and code version: `<kind>-<12 hex digits>`."""
        text = json.dumps(self.describe(), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def score(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, size, size, 3]` uint8 -> `[B, grid, grid]` float32, mean 1 an image."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixel_frequency(pixels.div_(255), self.grid, self.kind, self.band)
