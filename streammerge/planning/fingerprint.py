"""What makes two merges the same: the recipe, the inputs' contents, and the arithmetic.

Paths, times and inodes are not part of it, since inputs get staged and copied; nor are budget,
threads and ways of reading, which never change a byte of the output. A model is known by its
tensors, whatever their order and files; the output's layout, which follows the donor's, is part.
"""

from __future__ import annotations

import hashlib
import json
import platform
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from streammerge import __version__, grid
from streammerge.device import CPU, Device
from streammerge.planning.inputs import Inputs, Model
from streammerge.storage.checksum import checksum
from streammerge.storage.donated import donated
from streammerge.storage.shard import ShardLayout
from streammerge.storage.smallfile import pread, unreadable
from streammerge.words import Extent

# 64 KiB at 16 places for each 4 GiB of a model: a file of the hub has about that size.
_SAMPLES = 16
_SAMPLED_BYTES = 4 << 30
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that the output's bytes depend on, part by part; see `differences`."""

    recipe: str  # in its portable form
    inputs: dict[str, Any]
    layout: dict[str, str]  # output shard -> sha256 of its header
    grid: int  # elements of a tile
    environment: dict[str, Any]
    version: str  # major and minor

    @property
    def fingerprint(self) -> str:
        """A digest of all parts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def identify(
    inputs: Inputs,
    layouts: Sequence[ShardLayout],
    recipe_yaml: str,
    tokenizer: Path | None = None,
    device: Device = CPU,
) -> Identity:
    """Read the places that tell inputs apart: a MiB of each model, or of each 4 GiB of it."""
    found = {
        "base": _weights(inputs.base.tensors) if inputs.base else None,
        "models": [_model(model) for model in inputs.models],
        "donated": _donated(inputs.donor.path, tokenizer),
    }
    layout = {one.name: hashlib.sha256(one.header).hexdigest() for one in layouts}
    version = minor(__version__)
    return Identity(recipe_yaml, found, layout, grid.TILE_ELEMENTS, environment(device), version)


def minor(version: str) -> str:
    """The part of a version that says which bytes a merge gives."""
    return ".".join(version.split(".")[:2])


def environment(device: Device = CPU) -> dict[str, Any]:
    """What the last bit of the arithmetic depends on besides the inputs."""
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {
        "device": device.kind,
        "machine": platform.machine(),
        "numpy": np.__version__,
        "blas": sorted(f"{p['internal_api']} {p['version']} {p.get('architecture')}" for p in blas),
    }


def _weights(tensors: Mapping[str, Extent]) -> dict[str, Any]:
    """Names, types and shapes in the order of names, and crc32c of samples in that order."""
    extents = [tensors[name] for name in sorted(tensors)]
    specs = [[e.spec.name, e.spec.dtype.label, *e.spec.shape] for e in extents]
    starts = list(accumulate((e.spec.nbytes for e in extents), initial=0))
    total = starts.pop()
    crc = 0
    for place in _places(total):
        index = bisect_right(starts, place) - 1  # of equal starts, the one that has bytes
        crc = _sampled(extents[index:], place - starts[index], crc)
    return {
        "tensors": len(extents),
        "bytes": total,
        "specs_sha256": hashlib.sha256(json.dumps(specs).encode()).hexdigest(),
        "sampled_crc32c": crc,
    }


def _places(total: int) -> Sequence[int]:
    """Where samples start in so many bytes of tensors laid end to end."""
    steps = _SAMPLES * max(1, -(-total // _SAMPLED_BYTES)) - 1
    last = max(0, total - _SAMPLE_BYTES)
    return sorted({last * step // steps for step in range(steps + 1)}) if total else ()


def _sampled(extents: Iterable[Extent], start: int, crc: int) -> int:
    """crc32c of 64 KiB from `start` of the first of some tensors laid end to end."""
    left = _SAMPLE_BYTES
    for extent in extents:
        length = min(left, extent.spec.nbytes - start)
        try:
            with open(extent.path, "rb", buffering=0) as file:
                crc = checksum(pread(file.fileno(), length, extent.offset + start), crc)
        except OSError as error:
            raise unreadable(extent.path, error) from error
        start, left = 0, left - length
        if not left:
            break
    return crc


def _model(model: Model) -> dict[str, Any]:
    own = None if model.on_base else _weights(model.folder.tensors)
    entry: dict[str, Any] = {"name": model.name, "weights": own}
    if model.adapter:
        folder = model.adapter.folder
        entry["adapter"] = _weights(folder.header.tensors)
        entry["adapter_config_sha256"] = _digest(folder.path / "adapter_config.json")
    return entry


def _donated(donor: Path, tokenizer: Path | None) -> dict[str, str]:
    return {str(name): _digest(path) for name, path in donated(donor, tokenizer).items()}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(str(path), error) from error
