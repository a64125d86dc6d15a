"""A merge that is a weighted sum: no tile of it needs a method's code.

The terms of the models are rows of sources and low-rank products. Equal rows are read once and
their coefficients added; all low-rank updates are one product over stacked factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from streammerge.arrays import PerModel, Rows
from streammerge.kernels.weighted import (
    add,
    add_scaled,
    fill,
    sum_of_squared_differences,
    sum_of_squares,
)
from streammerge.scratch import Scratch
from streammerge.sources.dense import Dense
from streammerge.sources.low_rank import Product
from streammerge.sources.replaced import Replaced
from streammerge.storage.bytesource import Files
from streammerge.words import Factors, Fold, Source, StatisticValue, TensorSpec, Terms, Tile


class WeightedSum:
    """On deltas `base + sum c_i (rows_i - base) + product`; on weights `sum c_i rows_i + product`.

    In float32: the product first, then the rows in the order in which the models name them, the
    base last on deltas.
    """

    def __init__(
        self,
        files: Files,
        base: Source | None,
        models: Sequence[Source],
        coefficients: Sequence[float],
        space: Literal["deltas", "weights"],
    ) -> None:
        self._base = base
        self._spec = models[0].spec
        self._models = len(models)
        self._on_deltas = space == "deltas"
        self._rows: list[tuple[Source, float, list[int]]] = []  # source, coefficient, models
        self._factor_models: list[int] = []
        factors: list[Factors] = []
        weights: list[float] = []
        split = self._split(models)
        for index, (terms, coefficient) in enumerate(zip(split, coefficients, strict=True)):
            self._add_rows(terms.rows, coefficient, None if terms.factors else index)
            factors += terms.factors
            weights += [coefficient] * len(terms.factors)
            self._factor_models += [index] * len(terms.factors)
        self._product = Product(files, factors, weights) if factors else None

    def _split(self, models: Sequence[Source]) -> list[Terms]:
        """The terms of each model; those of another model with an adapter stay together.

        What they change about the base is one norm, which neither of the terms has.
        """
        terms = [model.terms() for model in models]
        compared = self._on_deltas or any(one.rows is self._base for one in terms)
        return [
            Terms(model) if compared and one.factors and one.rows is not self._base else one
            for model, one in zip(models, terms, strict=True)
        ]

    def _add_rows(self, rows: Source, coefficient: float, model: int | None) -> None:
        if self._on_deltas and rows is self._base:
            return  # its difference from the base is nothing
        own = [] if model is None else [model]
        for at, (known, weight, users) in enumerate(self._rows):
            if known is rows:
                self._rows[at] = known, weight + coefficient, users + own
                return
        self._rows.append((rows, coefficient, own))

    def same_as(self) -> Source | None:
        """The stored rows that the sum equals as they are, if any.

        On deltas that is the base, or the one model that is added to it in full: what it stores is
        the result, and `base + (x - base)` would be off by a rounding for many elements.
        """
        if self._product is not None or len(self._rows) > 1:
            return None
        if not self._rows:
            return self._base
        source, coefficient, _ = self._rows[0]
        whole = np.float32(coefficient) == 1
        return source if whole and isinstance(source, Dense | Replaced) else None

    @property
    def spec(self) -> TensorSpec:
        return self._spec

    @property
    def measured(self) -> TensorSpec:
        return self.spec

    @property
    def resident_bytes(self) -> int:
        rows = sum(source.resident_bytes for source, _, _ in self._rows)
        return rows + (self._product.resident_bytes if self._product else 0)

    @property
    def _reads_base(self) -> bool:
        in_sum = any(source is self._base for source, _, _ in self._rows)
        return self._base is not None and (self._on_deltas or in_sum)

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        return {}

    def state_bytes(self) -> tuple[int, int]:
        return 0, 0

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        return {}

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        shape = tile.shape(self._spec)
        out = scratch.rows("merged", shape)
        norms = np.full(1 + self._models, np.nan)
        if self._product:
            of_factors = self._product.rows_and_norms(tile, out, scratch)
            norms[1:] = np.bincount(self._factor_models, of_factors, self._models)
        else:
            fill(out, -0.0)  # what adds nothing: 0.0 would turn an element that is -0.0 into 0.0
        base = self._read_base(tile, scratch)
        if base is not None:
            norms[0] = sum_of_squares(base)
        for source, coefficient, models in self._rows:
            rows, squared = self._read(source, tile, base, scratch)
            add_scaled(out, coefficient, rows)
            if models:
                norms[[1 + model for model in models]] = squared
        if self._on_deltas:
            assert base is not None
            add(base, out, out)
        return out, norms

    def _read(
        self, source: Source, tile: Tile, base: Rows | None, scratch: Scratch
    ) -> tuple[Rows, float]:
        """The rows that enter the sum, and the squared norm of what they change about the base."""
        if base is not None and source is self._base:
            return base, 0.0
        rows = scratch.rows("rows", tile.shape(self._spec))
        if self._on_deltas:
            source.delta(tile, base, rows, scratch)
            return rows, sum_of_squares(rows)
        source.read(tile, rows, scratch)
        return rows, float("nan") if base is None else sum_of_squared_differences(rows, base)

    def _read_base(self, tile: Tile, scratch: Scratch) -> Rows | None:
        if self._base is None or not self._reads_base:
            return None
        rows = scratch.rows("base", tile.shape(self._spec))
        self._base.read(tile, rows, scratch)
        return rows

    def _sources(self) -> list[Source]:
        sources = [source for source, _, _ in self._rows]
        if self._base is not None and self._reads_base and self._base not in sources:
            sources.append(self._base)
        return sources

    def waves(self) -> Sequence[Sequence[str]]:
        return ()

    @property
    def once_bytes(self) -> int:
        product = self._product.once_bytes if self._product else 0
        return product + sum(source.once_bytes for source in self._sources())

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        return 0

    def part_bytes(self) -> int:
        return 0

    def merge_bytes(self, tile: Tile) -> int:
        product = self._product.read_bytes(tile) if self._product else 0
        return product + sum(source.read_bytes(tile) for source in self._sources())

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self._spec)
        others = any(source is not self._base for source, _, _ in self._rows)
        buffers = 1 + self._reads_base + others
        product = self._product.scratch_bytes(tile) if self._product else 0
        stored = max((source.scratch_bytes(tile) for source in self._sources()), default=0)
        return buffers * 4 * rows * cols + product + stored

    def release(self) -> None:
        if self._product:
            self._product.release()
        for source, _, _ in self._rows:
            source.release()
