"""The models of one tensor together: their inner products, and a sum with factors known late.

`ByRows` serves whatever the models are; `ByFactors` where each is the base with a low-rank update,
so that inner products come from the factors and the sum is one product over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streammerge.arrays import Factor, PerModel, Rows
from streammerge.kernels.weighted import (
    add,
    add_scaled,
    fill,
    multiply_by,
    sum_of_squares,
)
from streammerge.scratch import Scratch
from streammerge.sources.low_rank import Product
from streammerge.sources.stack import Stack
from streammerge.storage.bytesource import Files
from streammerge.words import Source, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray


# What numpy takes to broadcast or to cast in passing: 8192 elements of each operand.
_NUMPY_BYTES = 3 * 8 * 8192


class Together(Protocol):
    """What `Combined` asks of the models of a tensor."""

    @property
    def resident_bytes(self) -> int: ...

    @property
    def once_bytes(self) -> int: ...

    def stack(self, tile: Tile, index: int, scratch: Scratch) -> Stack: ...

    def add_up(
        self, tile: Tile, factors: Sequence[Factor], base: Rows | None, out: Rows, scratch: Scratch
    ) -> PerModel:
        """`out` becomes the sum of the deltas times their factors; returns their squared norms."""
        ...

    def needs_base(self, models: Sequence[int]) -> bool:
        """Whether the deltas of some models want the base's rows."""
        ...

    def read_bytes(self, tile: Tile, models: Sequence[int]) -> int: ...

    def scratch_bytes(self, tile: Tile) -> int: ...

    def release(self) -> None: ...


class ByRows:
    """Row by row: each model's delta is formed and added."""

    def __init__(self, base: Source | None, models: Sequence[Source]) -> None:
        self._base = base
        self._models = tuple(models)

    @property
    def resident_bytes(self) -> int:
        return sum(model.resident_bytes for model in self._models)

    @property
    def once_bytes(self) -> int:
        return sum(model.once_bytes for model in self._models)

    def stack(self, tile: Tile, index: int, scratch: Scratch) -> Stack:
        return Stack(self._base, self._models, tile, index, scratch)

    def add_up(
        self, tile: Tile, factors: Sequence[Factor], base: Rows | None, out: Rows, scratch: Scratch
    ) -> PerModel:
        fill(out, 0.0)
        norms = []
        for source, factor in zip(self._models, factors, strict=True):
            rows = scratch.rows("rows", out.shape)
            if self._base is None:
                source.read(tile, rows, scratch)
            else:
                source.delta(tile, base if source.needs_base else None, rows, scratch)
            norms.append(sum_of_squares(rows))
            add_times(out, factor, rows, tile)
        return np.array(norms, np.float64)

    def needs_base(self, models: Sequence[int]) -> bool:
        return self._base is not None and any(self._models[model].needs_base for model in models)

    def read_bytes(self, tile: Tile, models: Sequence[int]) -> int:
        return sum(self._models[model].read_bytes(tile) for model in models)

    def scratch_bytes(self, tile: Tile) -> int:
        """All deltas to measure; to merge, one of them and the sum."""
        rows, cols = tile.shape(self._models[0].spec)
        sources = [*self._models, *([self._base] if self._base is not None else [])]
        stored = max(source.scratch_bytes(tile) for source in sources)
        return tiles_held(len(self._models)) * 4 * rows * cols + stored + _NUMPY_BYTES

    def release(self) -> None:
        for model in self._models:
            model.release()


def add_times(out: Rows, factor: Factor, rows: Rows, tile: Tile) -> None:
    """`out += factor * rows`, in float32; changes `rows` where the factor is an array."""
    if isinstance(factor, float):
        add_scaled(out, factor, rows)
        return
    here = factor if len(factor) == 1 else factor[tile.start : tile.stop]
    multiply_by(rows, here)
    add(out, rows, out)


def tiles_held(models: int) -> int:
    """How many float32 tiles a thread holds: the base, the stack, one delta and the sum."""
    return 1 + models + 2


class ByFactors:
    """One product over the stacked factors of all models, which are the base plus these."""

    def __init__(self, files: Files, base: Source, models: Sequence[Source]) -> None:
        terms = [model.terms().factors for model in models]
        self._base = base
        self._models = tuple(models)
        self._owner = [index for index, own in enumerate(terms) for _ in own]
        self._product = Product(files, [pair for own in terms for pair in own])

    @property
    def resident_bytes(self) -> int:
        return self._product.resident_bytes + self._product.gram_resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._product.once_bytes

    def stack(self, tile: Tile, index: int, scratch: Scratch) -> Stack:
        inner = partial(self._gram, tile, scratch)
        return Stack(self._base, self._models, tile, index, scratch, gram=inner)

    def _gram(self, tile: Tile, scratch: Scratch) -> NDArray[np.float64]:
        found = np.zeros((len(self._models), len(self._models)))
        np.add.at(found, np.ix_(self._owner, self._owner), self._product.gram(tile, scratch))
        return found

    def add_up(
        self, tile: Tile, factors: Sequence[Factor], base: Rows | None, out: Rows, scratch: Scratch
    ) -> PerModel:
        weights = [float(factors[model]) for model in self._owner]
        norms = self._product.rows_and_norms(tile, out, scratch, weights)
        return np.asarray(np.bincount(self._owner, norms, len(self._models)), np.float64)

    def needs_base(self, models: Sequence[int]) -> bool:
        return False

    def read_bytes(self, tile: Tile, models: Sequence[int]) -> int:
        return self._product.read_bytes(tile) if models else 0

    def scratch_bytes(self, tile: Tile) -> int:
        """Inner products; to merge, the sum and the base."""
        rows, cols = tile.shape(self._base.spec)
        merging = 2 * 4 * rows * cols + self._product.scratch_bytes(tile)
        return max(merging + self._base.scratch_bytes(tile), self._product.gram_scratch_bytes(tile))

    def release(self) -> None:
        self._product.release()


def together(
    files: Files, base: Source | None, models: Sequence[Source], *, rows: bool
) -> Together:
    """The models of a tensor; `rows` says whether more than inner products is looked at."""
    if base is None or rows or not low_rank(base, models):
        return ByRows(base, models)
    return ByFactors(files, base, models)


def low_rank(base: Source | None, models: Sequence[Source]) -> bool:
    """Whether all models are the base plus products, so that none of their rows need be made."""
    terms = [model.terms() for model in models]
    return all(one.rows is base and one.factors for one in terms)
