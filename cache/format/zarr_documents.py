"""The Zarr v3 side of a store: its four arrays, their ``zarr.json`` documents and the names of their files.

Everything here follows from the layout and the number of rows, so ``verify`` can compare the files on disk with it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .layout import FILL, StoreLayout

TEXT_ARRAYS = {"tokens": ("int32", -1), "documents": ("int32", -1), "flags": ("uint8", 255)}  # name: (dtype, fill)
ARRAYS = ("activations", *TEXT_ARRAYS)

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}
_COMPRESSORS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "lz4": [
        {
            "name": "blosc",
            "configuration": {"typesize": 2, "cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0},
        }
    ],
    "zstd": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
}


def array_document(name: str, layout: StoreLayout, rows: int) -> dict[str, Any]:
    """The complete ``zarr.json`` of one array of a store with ``rows`` rows."""
    if name == "activations":
        return _document(
            shape=[rows, layout.context, layout.d_model],
            chunk=[layout.shard_rows, layout.context, layout.d_model],
            dtype="uint16",
            fill=FILL,
            codecs=[_sharding(layout)],
            names=["row", "position", "d_model"],
            attributes={"bits_of": "bfloat16"},
        )
    dtype, fill = TEXT_ARRAYS[name]
    return _document(
        shape=[rows, layout.context],
        chunk=[layout.shard_rows, layout.context],
        dtype=dtype,
        fill=fill,
        codecs=[_BYTES if np.dtype(dtype).itemsize > 1 else {"name": "bytes"}, _CRC],
        names=["row", "position"],
        attributes={},
    )


def _sharding(layout: StoreLayout) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [layout.chunk_rows, layout.context, layout.d_model],
            "codecs": [_BYTES, *_COMPRESSORS[layout.compression], _CRC],
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        },
    }


def _document(
    *,
    shape: list[int],
    chunk: list[int],
    dtype: str,
    fill: int,
    codecs: list[Any],
    names: list[str],
    attributes: dict[str, str],
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        # All shards of an array lie in one folder, so that one fsync of it makes a rename durable.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        "dimension_names": names,
        "attributes": attributes,
    }


def shard_key(name: str, shard: int) -> str:
    """Path of the file of one shard of one array, relative to the store."""
    return f"{name}/c.{shard}.0.0" if name == "activations" else f"{name}/c.{shard}.0"


def shard_of_name(name: str, file: str) -> int | None:
    """The shard number of a file name in the folder of array ``name``; None for any other file."""
    parts = file.split(".")
    zeros = 2 if name == "activations" else 1
    if len(parts) == zeros + 2 and parts[0] == "c" and parts[1].isdigit() and parts[2:] == ["0"] * zeros:
        return int(parts[1])
    return None


def to_json(document: Any) -> bytes:
    """JSON as in the store's files: indented, with a newline at the end."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
