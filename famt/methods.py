"""The methods of masked image modelling by name: a new one is a class, and a line here."""

from __future__ import annotations

from famt.mae import MaskedAutoencoder
from famt.masked import MaskedModel
from famt.simmim import SimMIM

METHODS: dict[str, type[MaskedModel]] = {"mae": MaskedAutoencoder, "simmim": SimMIM}
