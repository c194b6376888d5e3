"""From gradients to weights: AdamW, its learning rate along the run, clipping, averaged weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from famt.train.config import OptimiserConfig


class Optimisation:
    """What makes weights of gradients, step by step, and knows how far the run is.

    The learning rate rises linearly from 0, then falls along a cosine to 0. A parameter group may
    take a share of it (`lr_scale`).

    Args:
        config: learning rate, warm-up and the like.
        model: whose gradients are clipped together.
        groups: its parameters, as torch's optimisers take them.
        averaged: `model` or a part of it; if the run keeps averaged weights, they are of this.
        betas: of Adam's moments.
        epochs, steps_per_epoch: how long the run is.
        effective_batch: images a step, over all ranks.

    Attributes:
        step: optimiser steps done; it only grows.
        schedule_start: step that the schedule counts from; not 0 after an elastic restart, which
            lays it out anew.
        total_steps, warmup_steps: that the schedule is laid out for.
        learning_rate: at its peak.
        optimizer, schedule: torch's and timm's.
    """

    def __init__(
        self,
        config: OptimiserConfig,
        model: nn.Module,
        groups: list[dict[str, Any]],
        averaged: nn.Module,
        *,
        betas: tuple[float, float],
        epochs: int,
        steps_per_epoch: int,
        effective_batch: int,
    ) -> None:
        self.config = config
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.effective_batch = effective_batch
        self.step = self.schedule_start = 0
        self.total_steps = epochs * steps_per_epoch
        warmup_epochs = epochs / 20 if config.warmup_epochs is None else config.warmup_epochs
        self.warmup_steps = min(round(warmup_epochs * steps_per_epoch), self.total_steps // 2)
        self.learning_rate = config.base_learning_rate * effective_batch / 256
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, fused=True)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total_steps - self.warmup_steps,
            warmup_t=self.warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self._model, self._averaged = model, averaged
        self._average = ModelEmaV3(averaged, config.ema_decay) if config.ema_decay else None

    @property
    def ema(self) -> nn.Module | None:
        """The averaged weights, in a module like `averaged`, if the run keeps them."""
        return self._average.module if self._average else None

    @property
    def last_step(self) -> int:
        """The step that the run ends with."""
        return self.schedule_start + self.total_steps

    @property
    def present_learning_rate(self) -> float:
        """That of the last step, in the group with the largest one."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def progress(self, step: int) -> float:
        """Share of the run that is done before a step, in [0, 1]."""
        return (step - self.schedule_start) / self.total_steps

    def update(self) -> None:
        """One step with the gradients that are there, which are gone afterwards."""
        self.schedule.step_update(self.step - self.schedule_start)
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self._model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._average:
            self._average.update(self._averaged)
        self.step += 1

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return (self.step - self.schedule_start) // self.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on beside the model's weights."""
        return {
            "step": self.step,
            "schedule_start": self.schedule_start,
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the very next step, after the model's weights were loaded."""
        self.step, self.schedule_start = state["step"], state["schedule_start"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self._average:
            if state["ema"]:
                self._average.module.load_state_dict(state["ema"])
            else:  # the run begins to keep one
                self._average.set(self._averaged)

    def restart(self, state: dict[str, Any], epoch: int) -> None:
        """Go on from the beginning of an epoch, by the options of this run."""
        own = [dict(group) for group in self.optimizer.param_groups]
        self.load_state_dict(state)
        # Steps only grow, or a checkpoint would be older than those it follows.
        self.schedule_start = self.step - epoch * self.steps_per_epoch
        for group, now in zip(self.optimizer.param_groups, own, strict=True):
            group.update({name: now[name] for name in now if name != "params"})

    def describe(self) -> dict[str, str]:
        """Lines of a run's plan, by their names."""
        done = self.step - self.schedule_start
        return {
            "steps": f"{self.total_steps} = {self.epochs} epochs x {self.steps_per_epoch}, "
            f"{self.warmup_steps} of warm-up; {done} done",
            "learning rate": f"{self.learning_rate:.3g} at its peak = "
            f"{self.config.base_learning_rate:.3g} x {self.effective_batch} / 256",
        }
