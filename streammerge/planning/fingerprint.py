"""What makes two merges the same: the recipe, the inputs' contents, and the arithmetic.

Paths, times and inodes are not part of it, since inputs get staged and copied; nor are budget,
threads and ways of reading, which never change a byte of the output.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from streammerge import __version__, grid
from streammerge.errors import StorageError
from streammerge.planning.inputs import Inputs, Model
from streammerge.storage.checksum import checksum
from streammerge.storage.folder import donor_files
from streammerge.storage.header import Header

_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that the output's bytes depend on, part by part; see `differences`."""

    recipe: str  # in its portable form
    inputs: dict[str, Any]
    grid: int  # elements of a tile
    environment: dict[str, Any]
    version: str  # major and minor

    @property
    def fingerprint(self) -> str:
        """A digest of all parts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def identify(inputs: Inputs, recipe_yaml: str) -> Identity:
    """Read the places that tell inputs apart: about a MiB of each weight file."""
    found = {
        "base": [_weights(shard) for shard in inputs.base.shards] if inputs.base else None,
        "models": [_model(model) for model in inputs.models],
        "donated": _donated(inputs.donor.path),
    }
    return Identity(recipe_yaml, found, grid.TILE_ELEMENTS, environment(), minor(__version__))


def minor(version: str) -> str:
    """The part of a version that says which bytes a merge gives."""
    return ".".join(version.split(".")[:2])


def environment() -> dict[str, Any]:
    """What the last bit of the arithmetic depends on besides the inputs."""
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {
        "device": "cpu",
        "machine": platform.machine(),
        "numpy": np.__version__,
        "blas": sorted(f"{p['internal_api']} {p['version']} {p.get('architecture')}" for p in blas),
    }


def _weights(header: Header) -> dict[str, Any]:
    """A weight file by its header, its size, and crc32c of 64 KiB at each of 16 fixed places."""
    last = max(0, header.size_bytes - _SAMPLE_BYTES)
    crc = 0
    try:
        with open(header.path, "rb") as file:
            for place in sorted({last * step // (_SAMPLES - 1) for step in range(_SAMPLES)}):
                crc = checksum(os.pread(file.fileno(), _SAMPLE_BYTES, place), crc)
    except OSError as error:
        raise _unreadable(header.path, error) from error
    return {"header_sha256": header.digest, "bytes": header.size_bytes, "sampled_crc32c": crc}


def _model(model: Model) -> dict[str, Any]:
    own = None if model.on_base else [_weights(shard) for shard in model.folder.shards]
    entry: dict[str, Any] = {"name": model.name, "weights": own}
    if model.adapter:
        folder = model.adapter.folder
        entry["adapter"] = _weights(folder.header)
        entry["adapter_config_sha256"] = _digest(folder.path / "adapter_config.json")
    return entry


def _donated(donor: Path) -> dict[str, str]:
    return {str(file): _digest(donor / file) for file in donor_files(donor)}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _unreadable(str(path), error) from error


def _unreadable(path: str, error: OSError) -> StorageError:
    remedy = "check the disk and its mount"
    return StorageError(f"cannot be read: {error.strerror}", where=path, remedy=remedy)
