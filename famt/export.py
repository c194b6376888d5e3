"""Weights under other people's key names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from famt.mae import MaskedAutoencoder

_ENCODER = "encoder."


def encoder_state(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """The encoder's weights as `timm.create_model("vit_...", num_classes=0)` loads them.

    timm's own position embedding is a trained parameter of the same shape, so ours fits.
    """
    return dict(model.encoder.state_dict())


def official_state(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """All weights under the key names of the checkpoints that the MAE authors published.

    Raises:
        ValueError: the cross decoder, which those checkpoints don't have.
    """
    _refuse_cross(model)
    return {key.removeprefix(_ENCODER): value for key, value in model.state_dict().items()}


def load_official(model: MaskedAutoencoder, state: Mapping[str, Tensor]) -> None:
    """Load weights that carry the official MAE key names, positions included.

    Raises:
        RuntimeError: keys or shapes that do not fit, each named.
        ValueError: the cross decoder, which those checkpoints don't have.
    """
    _refuse_cross(model)
    own = {key.removeprefix(_ENCODER): key for key in model.state_dict()}
    model.load_state_dict({own.get(key, key): value for key, value in state.items()})


def _refuse_cross(model: MaskedAutoencoder) -> None:
    if model.config.decoder == "cross":
        raise ValueError(
            "the official MAE keys are those of the self decoder, and this model has the cross "
            "decoder; `encoder_state` gives its encoder's weights"
        )
