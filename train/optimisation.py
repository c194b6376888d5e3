"""The update of the weights: AdamW, learning-rate schedule, clipping, averaged weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from famt.pipeline.wording import counted
from famt.train.config import OptimiserConfig

_WARMUP_EPOCHS = 40  # of MAE's pre-training for 800 and for 1,600 epochs


class Optimisation:
    """Optimiser, schedule and averaged weights of a run; also counts its steps.

    The learning rate rises linearly from 0, then follows a cosine to 0. A parameter group may take
    a share of it (`lr_scale`).

    Args:
        config: learning rate, warm-up and the like.
        model: its gradients are clipped together.
        groups: its parameters, as torch's optimisers take them.
        averaged: `model` or a part of it, of which averaged weights are kept if configured.
        betas: of Adam's moments.
        epochs, steps_per_epoch: length of the run.
        effective_batch: images per step, over all ranks.

    Attributes:
        step: optimiser steps done; never decreases.
        schedule_start: step at which the schedule starts; above 0 after an elastic restart.
        total_steps, warmup_steps: length of the schedule and of its warm-up.
        learning_rate: at the peak.
        optimizer, schedule: of torch and of timm.
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
        share = min(epochs / 20, _WARMUP_EPOCHS)
        warmup_epochs = share if config.warmup_epochs is None else config.warmup_epochs
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
        """A copy of `averaged` with averaged weights, if the run keeps them."""
        return self._average.module if self._average else None

    @property
    def last_step(self) -> int:
        """Step at which the run ends."""
        return self.schedule_start + self.total_steps

    @property
    def present_learning_rate(self) -> float:
        """The largest of all parameter groups, at the last step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def progress(self, step: int) -> float:
        """Share of the run done before a step, in [0, 1]."""
        return (step - self.schedule_start) / self.total_steps

    def update(self) -> None:
        """Take a step with the present gradients, then clear them."""
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
        """Everything the next step depends on besides the model's weights."""
        return {
            "step": self.step,
            "schedule_start": self.schedule_start,
            "progress": self.progress(self.step),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly; the model's weights must be loaded already."""
        self.step, self.schedule_start = state["step"], state["schedule_start"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self._average:
            if state["ema"]:
                self._average.module.load_state_dict(state["ema"])
            else:  # this run keeps an average, the earlier one did not
                self._average.set(self._averaged)

    def restart(self, state: dict[str, Any], epoch: int) -> None:
        """Resume at the start of an epoch, with the options of this run."""
        own = [dict(group) for group in self.optimizer.param_groups]
        self.load_state_dict(state)
        # Steps never decrease, so that checkpoints stay in order.
        self.schedule_start = self.step - epoch * self.steps_per_epoch
        for group, now in zip(self.optimizer.param_groups, own, strict=True):
            group.update({name: now[name] for name in now if name != "params"})

    def describe(self) -> dict[str, str]:
        """Lines of a run's plan, by name."""
        done = self.step - self.schedule_start
        return {
            "steps": f"{self.total_steps} = {counted(self.epochs, 'epoch')} x "
            f"{self.steps_per_epoch}, {self.warmup_steps} of warm-up; {done} done",
            "learning rate": f"{self.learning_rate:.3g} at the peak = "
            f"{self.config.base_learning_rate:.3g} x {self.effective_batch} / 256",
        }
