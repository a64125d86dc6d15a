"""Dense and adapted sources; see `source_contract`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from streammerge.adapters.lora import low_rank
from streammerge.scratch import Scratch
from streammerge.sources.adapted import Adapted
from streammerge.sources.dense import Dense
from streammerge.sources.low_rank import Product
from streammerge.sources.replaced import Replaced
from streammerge.sources.scaled import Scaled
from streammerge.storage.bytesource import Files, Io
from streammerge.words import Addition, Source, Terms, Tile
from tests.contracts.small_inputs import decode, encode
from tests.contracts.source_contract import (
    SourceContract,
    open_files,
    random_tensor,
    write_odd,
)
from tests.oracles.dense import Exact

NAME = "model.layers.0.up.weight"


class DenseContract(SourceContract):
    dtype: ClassVar[str]
    exact = True

    def make(self, folder: Path, io: Io, rows: int, cols: int) -> tuple[Source, Files]:
        self.base = decode(random_tensor(rows, cols, self.dtype, 0))
        own = random_tensor(rows, cols, self.dtype, 1)
        self._own = decode(own).astype(np.float32)
        path = folder / "own.safetensors"
        extents = write_odd(path, {NAME: own})
        assert extents[NAME].offset % 2 == 1
        files = open_files(path, io=io)
        return Dense(files, extents[NAME]), files

    def values(self) -> tuple[Exact, Exact]:
        delta = self._own - self.base.astype(np.float32)
        return self._own.astype(np.float64), delta.astype(np.float64)

    def sizes(self) -> tuple[Exact, Exact]:
        return np.zeros(self._own.shape), np.zeros(self._own.shape)


class TestDenseBfloat16(DenseContract):
    dtype = "BF16"


class TestDenseFloat16(DenseContract):
    dtype = "F16"


class TestDenseFloat32(DenseContract):
    dtype = "F32"

    def test_its_delta_wants_the_base(self, tmp_path: Path) -> None:
        source, _ = self.make(tmp_path, "read", 3, 4)
        assert source.needs_base
        with pytest.raises(ValueError, match="base"):
            source.delta(Tile(0, 3), None, np.empty((3, 4), np.float32), Scratch())


class TestDenseFloat64(DenseContract):
    dtype = "F64"


class AdaptedContract(SourceContract):
    """A LoRA of rank 3 on the base or on another model."""

    exact = False
    rank: ClassVar[int] = 3
    scale: ClassVar[float] = 0.3
    on_base: ClassVar[bool]
    transposed: ClassVar[bool]
    factor_dtype: ClassVar[str] = "F32"

    @pytest.fixture(autouse=True, params=["left factor held", "left factor read by rows"])
    def _holding(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "left factor read by rows":
            monkeypatch.setattr("streammerge.sources.low_rank._HELD_BYTES", 0)

    def make(self, folder: Path, io: Io, rows: int, cols: int) -> tuple[Source, Files]:
        base = random_tensor(rows, cols, "BF16", 0)
        own = base if self.on_base else random_tensor(rows, cols, "BF16", 1)
        out, inner = (cols, rows) if self.transposed else (rows, cols)
        a = random_tensor(self.rank, inner, self.factor_dtype, 2)
        b = random_tensor(out, self.rank, self.factor_dtype, 3)
        self.base, self._own = decode(base), decode(own)
        product = self.scale * (decode(b) @ decode(a))
        size = self.scale * (np.abs(decode(b)) @ np.abs(decode(a)))
        self._product, self._size = (x.T if self.transposed else x for x in (product, size))
        paths = folder / "own.safetensors", folder / "adapter.safetensors"
        extents = write_odd(paths[0], {NAME: own})
        factors = write_odd(paths[1], {"a": a, "b": b})
        files = open_files(*paths, io=io)
        update = low_rank(factors["a"], factors["b"], self.scale, transposed=self.transposed)
        rows_of = Dense(files, extents[NAME])
        return Adapted(rows_of, Product(files, [update]), on_base=self.on_base), files

    def values(self) -> tuple[Exact, Exact]:
        return self._own + self._product, (self._own - self.base) + self._product

    def sizes(self) -> tuple[Exact, Exact]:
        return np.abs(self._own) + self._size, np.abs(self._own - self.base) + self._size

    def test_its_terms_are_the_rows_below_and_the_factors(self, tmp_path: Path) -> None:
        source, _ = self.make(tmp_path, "read", self.rows, self.cols)
        terms = source.terms()
        assert isinstance(terms.rows, Dense)
        (factors,) = terms.factors
        assert factors.rank == self.rank
        assert (factors.left.rows, factors.right.cols) == (self.rows, self.cols)


class OnTheBaseContract(AdaptedContract):
    """The delta is the update alone."""

    on_base = True

    def test_its_delta_is_the_update_where_the_base_is_large(self, tmp_path: Path) -> None:
        """(base + delta) - base would round it away."""
        source, _ = self.make(tmp_path, "read", self.rows, self.cols)
        assert not source.needs_base
        shape = (self.rows, self.cols)
        alone, beside = np.empty((2, *shape), np.float32)
        source.delta(Tile(0, self.rows), None, alone, Scratch())
        huge = np.full(shape, 1e30, np.float32)
        source.delta(Tile(0, self.rows), huge, beside, Scratch())
        assert alone.tobytes() == beside.tobytes()


class TestAdaptedOnTheBase(OnTheBaseContract):
    transposed = False


class TestAdaptedOnTheBaseTransposed(OnTheBaseContract):
    transposed = True
    factor_dtype = "BF16"


class TestAdaptedOnAnotherModel(AdaptedContract):
    on_base = False
    transposed = False
    factor_dtype = "F16"


class TestAdaptedOnAnotherModelTransposed(AdaptedContract):
    on_base = False
    transposed = True
    rank = 5


class ScaledContract(SourceContract):
    """A stored tensor times a number, on the base or on another model."""

    exact = True
    scale: ClassVar[float] = -0.7
    on_base: ClassVar[bool]

    def make(self, folder: Path, io: Io, rows: int, cols: int) -> tuple[Source, Files]:
        base = random_tensor(rows, cols, "BF16", 0)
        own = base if self.on_base else random_tensor(rows, cols, "BF16", 1)
        added = random_tensor(rows, cols, "F16", 2)
        self.base, self._own, self._added = decode(base), decode(own), decode(added)
        paths = folder / "own.safetensors", folder / "adapter.safetensors"
        rows_of = write_odd(paths[0], {NAME: own})[NAME]
        addition = Addition(self.scale, write_odd(paths[1], {"bias": added})["bias"])
        files = open_files(*paths, io=io)
        change = Scaled(files, addition)
        return Adapted(Dense(files, rows_of), change, on_base=self.on_base), files

    def values(self) -> tuple[Exact, Exact]:
        change = self.scale * self._added
        return self._own + change, (self._own - self.base) + change

    def sizes(self) -> tuple[Exact, Exact]:
        change = np.abs(self.scale * self._added)
        return np.abs(self._own) + change, np.abs(self._own - self.base) + change

    def test_it_is_no_product(self, tmp_path: Path) -> None:
        source, _ = self.make(tmp_path, "read", self.rows, self.cols)
        assert source.terms() == Terms(source)
        assert source.needs_base is not self.on_base


class TestScaledOnTheBase(ScaledContract):
    on_base = True


class TestScaledOnAnotherModel(ScaledContract):
    on_base = False


def test_float64_beyond_float32_is_infinite(tmp_path: Path) -> None:
    extents = write_odd(
        tmp_path / "w.safetensors", {NAME: encode(np.array([[1e300, -1e-300]]), "F64")}
    )
    source = Dense(open_files(tmp_path / "w.safetensors"), extents[NAME])
    out = np.empty((1, 2), np.float32)
    source.read(Tile(0, 1), out, Scratch())
    assert out.tolist() == [[np.inf, 0.0]]


class ReplacedContract(SourceContract):
    """Rows of another source, some of them replaced, given out of order."""

    exact = True
    on_base: ClassVar[bool]
    dtype: ClassVar[str]

    def make(self, folder: Path, io: Io, rows: int, cols: int) -> tuple[Source, Files]:
        base = random_tensor(rows, cols, "BF16", 0)
        own = base if self.on_base else random_tensor(rows, cols, "BF16", 1)
        indices = [rows - 1, 3, 0, 17, 4]
        trained = random_tensor(len(indices), cols, self.dtype, 2)
        self.base, self._own = decode(base), decode(own).astype(np.float32)
        self._own[indices] = decode(trained)
        paths = folder / "own.safetensors", folder / "adapter.safetensors"
        stored = write_odd(paths[0], {NAME: own})[NAME]
        extent = write_odd(paths[1], {"delta": trained})["delta"]
        files = open_files(*paths, io=io)
        source = Replaced(files, Dense(files, stored), extent, indices, on_base=self.on_base)
        return source, files

    def values(self) -> tuple[Exact, Exact]:
        delta = self._own - self.base.astype(np.float32)
        return self._own.astype(np.float64), delta.astype(np.float64)

    def sizes(self) -> tuple[Exact, Exact]:
        return np.zeros(self._own.shape), np.zeros(self._own.shape)


class TestReplacedOnTheBase(ReplacedContract):
    on_base = True
    dtype = "F32"


class TestReplacedOnAnotherModel(ReplacedContract):
    on_base = False
    dtype = "F16"
