"""A shard's entry as zarr objects: how they are made, and how they are read back and checked.

One chunk an array, compressed, with a CRC-32C behind it; a checksum in every zarr.json. So an
object that was cut short, or in which a bit flipped, is found when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
import zarr.api.asynchronous
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, WrapperStore
from zarr.storage import ObjectStore as ZarrStore

from pipeline import storage
from pipeline.scores import Spec
from pipeline.sealed import FORMAT, CacheError, damaged, seal_zarr, unseal_zarr

SAMPLES, KEY = "samples", "key"


def table_objects(
    attributes: dict[str, Any], samples: NDArray[np.int64], keys: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of a table's objects, in the order to put them: the last completes it.

    Args:
        attributes: of the group.
        samples: `[n, 3]`: offset, size, label.
        keys: of the samples.
    """
    group, objects = _group({"format": FORMAT, **attributes})
    _add(group, SAMPLES, samples, {})
    _add(group, KEY, np.array(keys, dtype=np.dtypes.StringDType()), {})
    return _in_order(objects, "")


def maps_objects(spec: Spec, maps: NDArray[np.float16]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the objects of maps, in the order to put them: the last completes them."""
    group, objects = _group({})
    _add(group, spec.id, maps, {"spec": spec.describe()})
    return _in_order(objects, f"{spec.id}/")


class CheckedStore(WrapperStore[ZarrStore]):
    """A store whose objects are all there and whole, or an error: zarr reads a chunk that is gone
    as zeros.

    Args:
        store: of the cache.
        url: of the cache, for errors.
    """

    def __init__(self, store: ZarrStore, url: str) -> None:
        super().__init__(store)
        self._url = url

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """See zarr; raises CacheError."""
        data = await super().get(key, prototype, byte_range)
        if not key.endswith("/zarr.json"):
            if data is None:
                raise damaged(f"{self._url}/{key}", "it is gone", remedy(self._url, key))
        elif data is not None:
            unseal_zarr(data.to_bytes(), f"{self._url}/{key}", remedy(self._url, key))
        return data


async def read_array(store: CheckedStore, url: str, path: str) -> NDArray:
    """An array of an entry, whole and as it was put.

    Raises:
        FileNotFoundError: there is none.
        CacheError: it is damaged.
    """
    try:
        array = await zarr.api.asynchronous.open_array(
            store=store, path=path, mode="r", zarr_format=3
        )
        return np.asarray(await array.getitem(...))
    except (CacheError, *storage.UNREACHABLE):
        raise
    except Exception as error:  # codecs raise anything on what is no code of theirs
        reason = f"{type(error).__name__}: {error}"
        raise damaged(f"{url}/{path}", reason, remedy(url, path)) from error


def remedy(url: str, path: str) -> str:
    """What helps against damage in an object of an entry: to remove what it is part of."""
    parts = path.split("/")
    if len(parts) > 3 and parts[2] not in (SAMPLES, KEY):
        return (
            f"Remove {url}/{'/'.join(parts[:3])} and make these maps again: "
            "jobs/precompute_freq.py for scores of pixels, jobs/refresh_scores.py for a model's"
        )
    return f"Remove {url}/{'/'.join(parts[:2])} and run jobs/precompute_freq.py again"


def _group(attributes: dict[str, Any]) -> tuple[zarr.Group, dict[str, Buffer]]:
    objects: dict[str, Buffer] = {}
    return zarr.create_group(MemoryStore(store_dict=objects), attributes=attributes), objects


def _add(group: zarr.Group, name: str, data: NDArray, attributes: dict[str, Any]) -> None:
    """One array in one chunk; zarr refuses chunks without extent, so an empty one gets a length."""
    group.create_array(
        name,
        data=data,
        chunks=tuple(max(1, extent) for extent in data.shape),
        compressors=[ZstdCodec(), Crc32cCodec()],
        attributes=attributes,
        config={"write_empty_chunks": True},  # a chunk that is not there is damage
    )


def _in_order(objects: dict[str, Buffer], prefix: str) -> Iterator[tuple[str, bytes]]:
    """Data first, then each array's metadata, then the group's."""
    for name in sorted(objects, key=lambda name: (name.endswith("zarr.json"), -name.count("/"))):
        if name.startswith(prefix):
            data = objects[name].to_bytes()
            yield name, seal_zarr(data) if name.endswith("zarr.json") else data
