"""The methods of masked image modelling by name: a new one is a class, and a line here."""

from __future__ import annotations

from famt.mae import MaskedAutoencoder

METHODS: dict[str, type[MaskedAutoencoder]] = {"mae": MaskedAutoencoder}
