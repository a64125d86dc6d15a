"""Tiny writers of input files for tests: safetensors files and model folders, byte by byte.

They depend on nothing that is under test, so a fault there cannot hide itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Tensor: TypeAlias = tuple[str, tuple[int, ...], bytes]  # dtype as in the header, shape, data


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The header of a file that holds the tensors in this order."""
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [offset, offset + len(data)]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += len(data)
    return document


def frame(header: bytes | Mapping[str, Any], data: bytes) -> bytes:
    """A file's bytes: header length, header, byte buffer. Nothing is checked."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file whose tensors lie in the order of the mapping."""
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(frame(header_of(tensors, metadata), data))
    return path


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder: the tensors dealt in order to `shards` files, an index if several."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map, sum(len(data) for _, _, data in tensors.values()))
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int = 0) -> Path:
    """Write `model.safetensors.index.json`."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path
