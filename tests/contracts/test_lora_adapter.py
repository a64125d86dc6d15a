"""LoRA on an ordinary weight and on one that is stored transposed; see `adapter_contract`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from streammerge.adapters.lora import low_rank
from streammerge.storage.bytesource import Files
from streammerge.words import Factors
from tests.contracts.adapter_contract import AdapterContract
from tests.contracts.small_inputs import decode
from tests.contracts.source_contract import open_files, random_tensor, write_odd
from tests.oracles.dense import Exact


class LoraContract(AdapterContract):
    transposed: ClassVar[bool]
    dtype: ClassVar[str]
    rank: ClassVar[int]
    scale: ClassVar[float]

    def make(self, folder: Path) -> tuple[Factors, Files]:
        rows, cols = self.shape[::-1] if self.transposed else self.shape
        a = random_tensor(self.rank, cols, self.dtype, 1)
        b = random_tensor(rows, self.rank, self.dtype, 2)
        self._a, self._b = decode(a), decode(b)
        path = folder / "adapter_model.safetensors"
        extents = write_odd(path, {"a": a, "b": b})
        ends = extents["a"], extents["b"]
        return low_rank(*ends, self.scale, transposed=self.transposed), open_files(path)

    def update(self) -> tuple[Exact, Exact]:
        value = self.scale * (self._b @ self._a)
        size = abs(self.scale) * (np.abs(self._b) @ np.abs(self._a))
        return (value.T, size.T) if self.transposed else (value, size)


class TestLora(LoraContract):
    transposed, dtype, rank, scale = False, "F32", 4, 2.0


class TestLoraTransposed(LoraContract):
    transposed, dtype, rank, scale = True, "BF16", 3, 1 / 3


class TestLoraOfRankOne(LoraContract):
    transposed, dtype, rank, scale = False, "F16", 1, -0.7


class TestLoraOfFullRank(LoraContract):
    transposed, dtype, rank, scale = True, "F64", 23, 0.01
