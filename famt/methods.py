"""Methods of masked image modelling, by name. A new method is a subclass and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from famt.models import ModelConfig

if TYPE_CHECKING:
    from famt.masked import MaskedModel


@dataclass(frozen=True)
class Method:
    """A method of masked image modelling; calling it builds its model.

    Attributes:
        model: class, `module:name`, imported when the model is built.
        plain_mask_ratio: share that the paper masks at random, with nothing thrown.
        has_decoder: whether it has the config's decoder.
        defaults: fields of the config that differ from MAE's.
    """

    model: str
    plain_mask_ratio: float
    has_decoder: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, config: ModelConfig) -> MaskedModel:
        built: MaskedModel = resolve_name(self.model)(config)
        return built


METHODS = {
    "mae": Method("famt.mae:MaskedAutoencoder", 0.75),
    "simmim": Method(
        "famt.simmim:SimMIM",
        0.6,
        has_decoder=False,
        defaults={"unit": 2, "normalise_targets": False},
    ),
}
