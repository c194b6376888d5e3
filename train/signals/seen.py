"""Attention to the visible patches in the training pass itself, without an extra pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from famt.attention import (
    attention_of,
    attention_scores,
    cls_attention,
    without_registers,
)
from famt.pipeline.errors import UserError
from famt.train.signals.banked import Banked
from famt.train.signals.config import AttentionConfig
from famt.train.signals.signal import Context, Step

_FORMULAS = {"attention": attention_scores, "cls_attention": cls_attention}


class Seen(Banked):
    """Maps of the attention in the encoder's last block during training steps.

    A step updates its visible patches only; masked and thrown ones keep their earlier values.
    """

    def __init__(self, slot: AttentionConfig, context: Context) -> None:
        if slot.kind not in _FORMULAS:
            raise UserError(
                f"--attention.kind {slot.kind}: --attention.source seen takes only "
                f"{' or '.join(_FORMULAS)}"
            )
        super().__init__(slot.exponent, context)
        self._kind, self._formula = slot.kind, _FORMULAS[slot.kind]
        self._encoder = context.encoder
        self._attention = context.encoder.blocks[-1].attn
        self._seen: list[Tensor] = []  # queries, keys and values, for each part of the batch
        self._hook = self._attention.qkv.register_forward_hook(self._see)

    def learn(self, step: Step) -> None:
        with torch.no_grad():
            seen = [without_registers(self._encoder, qkv) for qkv in self._seen]
            parts = [self._formula(attention_of(self._attention, qkv)) for qkv in seen]
        scores = torch.cat(parts)
        self._seen.clear()
        if scores.shape[1] != step.split.visible.shape[1]:
            raise UserError(
                "--attention.source seen: the encoder also sees masked patches; use rolling"
            )
        self.write_at(step.views, step.split.visible, scores, step.number)

    def close(self, *, finished: bool) -> None:
        self._hook.remove()

    def describe(self) -> str:
        return f"{self._kind} seen by the step's own pass, to the power {self.exponent:g}"

    def _see(self, layer: nn.Module, inputs: Any, qkv: Tensor) -> None:
        if torch.is_grad_enabled():  # a training pass, not one for scores, features or pictures
            self._seen.append(qkv.detach())
