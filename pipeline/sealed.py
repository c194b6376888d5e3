"""JSON that carries a checksum of itself, so that no flipped bit in it is ever believed.

Every JSON object of the cache has a field `checksum`: BLAKE3 of its content, written with sorted
keys and without spaces. A zarr.json has it among its attributes. What only moves spaces about, and
so parses to the same content, passes.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

FORMAT = 3  # 1 named shards by their SHA-256; 2 had no checksums
_FIELD = "checksum"


class CacheError(RuntimeError):
    """The cache lacks what was asked of it; the message names the shard and the remedy."""


def seal(content: dict[str, Any]) -> bytes:
    """A JSON object with its format and its checksum."""
    content = {"format": FORMAT, **content}
    return json.dumps({**content, _FIELD: _checksum(content)}, indent=1).encode()


def unseal(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The content that `seal` was given.

    Args:
        data: the object's bytes.
        where: its name, for errors.
        remedy: what helps against damage, for errors.

    Raises:
        CacheError: not a byte of it can be trusted, or another version of this program wrote it.
    """
    content = _parsed(data, where, remedy)
    found = content.pop(_FIELD, None)
    if found not in (None, _checksum(content)) or "format" not in content:
        raise damaged(where, "its checksum is wrong", remedy)
    check_format(content.pop("format"), where)
    if found is None:
        raise damaged(where, "it has no checksum", remedy)
    return content


def seal_zarr(data: bytes) -> bytes:
    """A zarr.json with a checksum among its attributes."""
    content = json.loads(data)
    attributes = {**content["attributes"], _FIELD: _checksum(content)}
    return json.dumps({**content, "attributes": attributes}, indent=1).encode()


def unseal_zarr(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The attributes of a zarr.json.

    Raises:
        CacheError: as `unseal`; one without a checksum that says it is of this format, too.
    """
    content = _parsed(data, where, remedy)
    attributes = content.get("attributes")
    if not isinstance(attributes, dict):
        raise damaged(where, "it has no attributes", remedy)
    found = attributes.pop(_FIELD, None)
    if found not in (None, _checksum(content)):
        raise damaged(where, "its checksum is wrong", remedy)
    if "format" in attributes:
        check_format(attributes["format"], where)
    if found is None:
        raise damaged(where, "it has no checksum", remedy)
    return attributes


def check_format(found: object, where: str) -> None:
    """Refuse what another version of this program wrote.

    Raises:
        CacheError: `found` is not `FORMAT`.
    """
    if found != FORMAT:
        raise CacheError(
            f"{where} has format {found}, and this version of FAMT reads format {FORMAT}; "
            "use the version that wrote it, or another cache"
        )


def damaged(where: str, why: object, remedy: str) -> CacheError:
    """The error for an object that can't be trusted."""
    return CacheError(f"{where} is damaged ({why}). {remedy}")


def _parsed(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise damaged(where, f"{len(data)} bytes that are no JSON", remedy) from None
    if not isinstance(content, dict):
        raise damaged(where, "no JSON object", remedy)
    return content


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode()).hexdigest(length=8)
