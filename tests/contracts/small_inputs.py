"""Models and adapters of a few hundred elements, whose task vectors are known to the last bit.

LoRA factors are whole numbers times a power of two, small enough that their float32 product is
exact in any order of summation. So an oracle knows the float32 task vector that a method is given,
and thresholds and equal magnitudes can be compared exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from tests.makers import Tensor, write_model, write_safetensors
from tests.oracles.dense import Exact, Single, Vector, rounded

Shape = tuple[int, ...]

_CARRIERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_LARGEST_FACTOR = 200  # exact in bfloat16; 16 products of two sum to less than 2^24
_FACTOR_UNIT = 2.0**-10


def encode(values: NDArray[Any], dtype: str) -> Tensor:
    """A tensor of the nearest values of a type."""
    near = rounded(np.asarray(values, np.float64), dtype)
    if dtype == "BF16":
        bits = near.astype("<f4").view("<u4") >> 16 if near.shape else _scalar_bits(near)
        return dtype, near.shape, bits.astype("<u2").tobytes()
    return dtype, near.shape, near.astype(_CARRIERS[dtype]).tobytes()


def _scalar_bits(value: Exact) -> NDArray[np.uint32]:
    return np.asarray(value.reshape(1).astype("<f4").view("<u4") >> 16)


def decode(tensor: Tensor) -> Exact:
    """A tensor's exact values."""
    dtype, shape, data = tensor
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").astype(np.float64).reshape(shape)
    return np.frombuffer(data, _CARRIERS[dtype]).astype(np.float64).reshape(shape)


def read_back(folder: Path) -> dict[str, Tensor]:
    """All tensors of an output, as the safetensors library reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, one in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            found[name] = one["dtype"], tuple(one["shape"]), bytes(one["data"])
    return found


@dataclass(frozen=True, slots=True)
class Update:
    """A LoRA on one tensor; `a` is `[r, in]`, `b` is `[out, r]`, as they lie in the file."""

    a: Exact
    b: Exact
    scale: float
    transposed: bool = False

    @property
    def delta(self) -> Exact:
        return self._oriented(self.scale * (self.b @ self.a))

    @property
    def size(self) -> Exact:
        return self._oriented(abs(self.scale) * (np.abs(self.b) @ np.abs(self.a)))

    def _oriented(self, product: Exact) -> Exact:
        return product.T if self.transposed else product


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that takes part: its own stored tensors, and an adapter's updates of them."""

    text: str  # how the recipe names it
    tensors: Mapping[str, Tensor]
    updates: Mapping[str, Update] = field(default_factory=dict)


class SmallInputs:
    """A base and what is merged into it, written into a folder."""

    def __init__(
        self, folder: Path, shapes: Mapping[str, Shape], dtype: str = "F32", *, seed: int = 0
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.random = np.random.default_rng(seed)
        self.base = {
            name: encode(self.random.normal(size=shape), dtype) for name, shape in shapes.items()
        }
        self.entries: list[Entry] = []
        self._write_model("base", self.base)

    def _write_model(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        shards = 2 if len(tensors) > 2 else 1
        return write_model(self.folder / name, tensors, shards, {"model_type": "llama"})

    def add_model(self, changed: Iterable[str] | None = None, *, size: float = 0.1) -> Entry:
        """A full model: the base with some tensors (all, by default) moved a little."""
        tensors = dict(self.base)
        for name in self.base if changed is None else changed:
            values = decode(self.base[name])
            tensors[name] = encode(
                values + size * self.random.normal(size=values.shape), self.dtype
            )
        name = f"model-{len(self.entries)}"
        entry = Entry(str(self._write_model(name, tensors)), tensors)
        self.entries.append(entry)
        return entry

    def add_adapter(
        self,
        names: Iterable[str],
        rank: int,
        *,
        scale: float = 0.5,
        dtype: str = "F32",
        on: Entry | None = None,
        transposed: bool = False,
        largest: int = _LARGEST_FACTOR,
    ) -> Entry:
        """A LoRA on some matrices of the base, or of another model; `scale` a power of two."""
        updates = {
            name: self._update(self.base[name][1], rank, scale, transposed, largest)
            for name in names
        }
        path = self.folder / f"adapter-{len(self.entries)}"
        write_adapter(path, updates, rank, scale, dtype)
        own = on.text if on else str(self.folder / "base")
        entry = Entry(f"{own}+{path}", on.tensors if on else self.base, updates)
        self.entries.append(entry)
        return entry

    def _update(
        self, shape: Shape, rank: int, scale: float, transposed: bool, largest: int
    ) -> Update:
        rows, cols = reversed(shape) if transposed else shape
        a, b = (
            np.asarray(self.random.integers(-largest, largest + 1, size) * _FACTOR_UNIT)
            for size in ((rank, cols), (rows, rank))
        )
        return Update(a, b, scale, transposed)

    # ------------------------------------------------------------------------ for the oracles

    def origin(self, name: str) -> Exact:
        return decode(self.base[name])

    def touches(self, entry: Entry, name: str) -> bool:
        """Whether a model can differ from the base there."""
        return entry.tensors is not self.base or name in entry.updates

    def model(self, entry: Entry, name: str) -> Vector:
        """A model's tensor, exactly."""
        own = decode(entry.tensors[name])
        update = entry.updates.get(name)
        if update is None:
            return Vector(own, np.abs(own))
        return Vector(own + update.delta, np.abs(own) + update.size, 1 + update.a.shape[0])

    def delta(self, entry: Entry, name: str) -> Vector:
        """A model's difference from the base, exactly."""
        difference = decode(entry.tensors[name]) - self.origin(name)
        update = entry.updates.get(name)
        if update is None:
            return Vector(difference, np.abs(difference), 2)
        return Vector(
            difference + update.delta, np.abs(difference) + update.size, 2 + update.a.shape[0]
        )

    def task_vector(self, entry: Entry, name: str) -> Single:
        """A model's difference from the base, as float32 gives it to a method."""
        own, base = decode(entry.tensors[name]), self.origin(name)
        difference = own.astype(np.float32) - base.astype(np.float32)
        update = entry.updates.get(name)
        if update is None:
            return np.asarray(difference, np.float32)
        return np.asarray(update.delta.astype(np.float32) + difference, np.float32)

    # ------------------------------------------------------------------------- for the engine

    def recipe(
        self,
        method: str,
        per_model: Sequence[Mapping[str, Any]] = (),
        shared: Mapping[str, Any] | None = None,
        out_dtype: str | None = None,
        name: str = "recipe",
    ) -> Path:
        """A recipe of all entries; `per_model` holds the parameters of each."""
        entries = [
            {"model": entry.text, "name": f"m{i}", "parameters": dict(parameters)}
            for i, (entry, parameters) in enumerate(
                zip(self.entries, per_model or [{}] * len(self.entries), strict=True)
            )
        ]
        document = {
            "merge_method": method,
            "base_model": str(self.folder / "base"),
            "models": entries,
            **({"parameters": dict(shared)} if shared else {}),
            **({"out_dtype": out_dtype} if out_dtype else {}),
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(document))  # which is YAML too
        return path


def write_adapter(
    folder: Path, updates: Mapping[str, Update], rank: int, scale: float, dtype: str = "F32"
) -> Path:
    """An adapter folder as PEFT saves it."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        module = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = encode(update.a, dtype)
        tensors[f"{module}.lora_B.weight"] = encode(update.b, dtype)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
