"""An encoder at some step of a run, as the job that refreshes scores reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from famt.models import ModelConfig
from famt.pipeline.errors import UserError
from famt.train import checkpoint
from famt.train.config import Pretrain


@dataclass(frozen=True)
class Encoder:
    """An encoder and what to score with it; the other attributes are those of `Checkpoint`.

    Attributes:
        kinds: model scores wanted.
        urls: tars to score, in the order of the run's rows; None for all that match its --shards.
    """

    run: str
    step: int
    sizes: dict[str, Any]
    weights: dict[str, Tensor]
    config: dict[str, Any]
    kinds: list[str]
    urls: list[str] | None = None

    def build(self) -> VisionTransformer:
        """The encoder, in eval mode."""
        encoder = ModelConfig(**self.sizes).encoder()
        encoder.load_state_dict(self.weights)
        return encoder.eval()


def save_encoder(path: Path, encoder: Encoder) -> None:
    """Write an encoder for the refresh job.

    Raises:
        OSError: writing failed, for example on a full disk.
    """
    path.parent.mkdir(exist_ok=True)
    checkpoint.write(path, encoder)


def load_encoder(path: Path) -> Encoder:
    """The encoder in a file of `save_encoder`, in a checkpoint, or in a run's last checkpoint.

    Raises:
        FileNotFoundError: there is none.
        UserError: the file is neither, or of fine-tuning.
    """
    if path.is_dir() or checkpoint.is_checkpoint(path):
        state, prefix = checkpoint.load_pretrained(path), "encoder."
        weights = {
            name.removeprefix(prefix): value
            for name, value in state.model.items()
            if name.startswith(prefix)
        }
        kinds = Pretrain.from_description(state.config).refreshed_kinds
        return Encoder(state.run, state.step, state.sizes, weights, state.config, kinds)
    try:
        return Encoder(**checkpoint.read(path))
    except TypeError:
        raise UserError(f"{path} is neither a checkpoint nor an encoder of a run") from None
