"""JSON that carries a checksum of itself and of its place in the cache.

Every JSON object of the cache has a field `checksum`: BLAKE3 of its path and its content, written
with sorted keys and without spaces. So a flipped bit in it is never believed, nor another object in
its place. A zarr.json has the checksum among its attributes, and that of an array the checksums of
its chunks too (`famt.pipeline.arrays`). What only moves spaces about parses to the same content,
and passes.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from famt.pipeline.errors import CacheError as CacheError

FORMAT = (
    4  # 1 named shards by their SHA-256; 2 had no checksums; those of 3 did not know their place
)
_FIELD, _CHUNKS = "checksum", "chunks"


class CacheFullError(CacheError):
    """The cache's disk has no room left, or its user no quota; nothing else will succeed."""


def seal(content: dict[str, Any], path: str) -> bytes:
    """A JSON object with its format and its checksum, to be put at `path` in a cache."""
    content = {"format": FORMAT, **content}
    return json.dumps({**content, _FIELD: _checksum(content, path)}, indent=1).encode()


def unseal(data: bytes, url: str, path: str, remedy: str) -> dict[str, Any]:
    """The content that `seal` was given.

    Args:
        data: the object's bytes.
        url: the cache's, for errors.
        path: where in the cache the object was found.
        remedy: what helps against damage, for errors.

    Raises:
        CacheError: the object was changed, belongs to another place, or another version of this
            program wrote it.
    """
    where = f"{url}/{path}"
    content = _parsed(data, where, remedy)
    found = content.pop(_FIELD, None)
    _check(content, content.get("format", FORMAT), found, where, path, remedy)
    if "format" not in content:
        raise damaged(where, "it has no format", remedy)
    del content["format"]
    return content


def seal_zarr(data: bytes, path: str, chunks: dict[str, str] | None = None) -> bytes:
    """A zarr.json with its checksum among its attributes, to be put at `path` in a cache.

    Args:
        chunks: of an array: checksum of each object, by its path below the array.
    """
    content = json.loads(data)
    if chunks is not None:
        content["attributes"][_CHUNKS] = chunks
    attributes = {**content["attributes"], _FIELD: _checksum(content, path)}
    return json.dumps({**content, "attributes": attributes}, indent=1).encode()


def unseal_zarr(data: bytes, url: str, path: str, remedy: str) -> dict[str, Any]:
    """The attributes of a zarr.json; arguments and errors as for `unseal`."""
    where = f"{url}/{path}"
    content = _parsed(data, where, remedy)
    attributes = content.get("attributes")
    if not isinstance(attributes, dict):
        raise damaged(where, "it has no attributes", remedy)
    found = attributes.pop(_FIELD, None)
    _check(content, attributes.get("format", FORMAT), found, where, path, remedy)
    return attributes


def chunks_of(attributes: dict[str, Any]) -> dict[str, str]:
    """Checksums of an array's chunks, by their paths below it; none of a group."""
    return attributes.get(_CHUNKS, {})


def checksum(data: bytes | memoryview) -> str:
    """Checksum of an object: 16 hex digits of BLAKE3."""
    return blake3(data).hexdigest(length=8)


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


def _check(
    content: dict[str, Any], version: object, found: object, where: str, path: str, remedy: str
) -> None:
    if version != FORMAT:
        raise CacheError(
            f"{where} has format {version}, and this version of FAMT reads format {FORMAT}. If "
            "another version made this cache, use that one, or another cache; else the object is "
            f"damaged. {remedy}"
        )
    if found is None:
        raise damaged(where, "it has no checksum", remedy)
    if found != _checksum(content, path):
        raise damaged(where, "its checksum is wrong: it was changed, or is another object", remedy)


def _checksum(content: dict[str, Any], path: str) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return checksum(f"{path}\n{text}".encode())
