"""Signals from refreshed maps of whole images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from famt.pipeline.loading.loader import CropBatch
from famt.train.log import Log
from famt.train.signals.cached import Cached
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.signals.signal import Context, Signal
from famt.train.stop import Stop


class Refreshed(Signal):
    """Scores of one kind from the newest generation; none before the first."""

    needs_refresh = True

    def __init__(self, slot: FrequencyConfig | AttentionConfig, context: Context) -> None:
        assert context.refreshed is not None
        self.exponent, self._kind, self._maps = slot.exponent, slot.kind, context.refreshed

    def begin_epoch(self, epoch: int, step: int, stop: Stop, log: Log | None) -> bool:
        return self._maps.begin_epoch(epoch, step, stop, log)

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        return self._maps.read(self._kind, crops)

    def state_dict(self) -> dict[str, Any]:
        return {"generation": self._maps.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["generation"] is not None:
            self._maps.restore(state["generation"])

    def restart(self, state: dict[str, Any], epoch: int) -> None:
        self._maps.restart(epoch)

    def saved(self, step: int, log: Log | None) -> None:
        self._maps.saved()

    def describe(self) -> str:
        power = "" if self.exponent == 1 else f" to the power {self.exponent:g}"
        return f"{self._kind} of whole images{power}, {self._maps.describe()}"

    def close(self, *, finished: bool) -> None:
        self._maps.close(finished=finished)


class CachedThenRefreshed(Refreshed):
    """The cached pixel score until the first generation, then the refreshed score."""

    reads_cache = True

    def __init__(self, slot: FrequencyConfig, context: Context) -> None:
        self._cached = Cached(slot, context)
        super().__init__(slot, context)
        self._own_exponent = slot.exponent

    def read(self, crops: CropBatch, step: int) -> Tensor | None:
        refreshed = super().read(crops, step)
        if refreshed is None:
            self.exponent = self._cached.exponent
            return self._cached.read(crops, step)
        self.exponent = self._own_exponent
        return refreshed

    def describe(self) -> str:
        self.exponent = self._own_exponent
        return f"{self._cached.describe()}, then {super().describe()}"
