"""The Gram matrix of the models: all their inner products, in float64, summed in grid order.

Slerp, nuslerp, multislerp, karcher and model_stock need nothing else of a tensor: whatever they
give is a combination of the models, and lengths and angles of combinations follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Literal

import numpy as np

from streammerge import grid
from streammerge.declarations import Buffers, Declared, Knobs
from streammerge.kernels.product import gram, products_along
from streammerge.scratch import Scratch
from streammerge.statistics.given import Same
from streammerge.statistics.of_stack import check_names, of_shared
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec, Tile

if TYPE_CHECKING:
    from streammerge.arrays import InnerProducts, Rows

Over = Literal["tensor", "each row", "each column"]


@dataclass(frozen=True, slots=True)
class Gram:
    """Declares the inner products of all models of the recipe.

    The value is float64 `[n, n]` over the tensor, `[rows, 1, n, n]` over each row or
    `[1, cols, n, n]` over each column, which a function of shared knobs tells; a tensor of one
    dimension is one vector. With the base, it comes first. Models that leave the tensor alone
    have zeros.
    """

    over: Callable[..., Over] | None = None
    with_base: bool = False

    def check(self, declared: Declared) -> None:
        if self.over is not None:
            check_names(self.over, declared.shared)

    def waits_for(self) -> Sequence[str]:
        return ()

    def measured(self, knobs: Knobs) -> Sequence[int]:
        return range(len(knobs.touching))

    def reads_base(self, knobs: Knobs) -> bool:
        return self.with_base

    def reads(self, knobs: Knobs) -> int:
        return 1

    def state_bytes(self, spec: TensorSpec, knobs: Knobs) -> tuple[int, int]:
        """The products as found, then of all models, and what a method makes of them."""
        vectors = self._vectors(spec, knobs, spec.rows)
        whole = self.with_base + knobs.models
        state = 8 * vectors * (self._size(knobs) ** 2 + whole**2 + whole + 8)
        return state, state

    def part_bytes(self, spec: TensorSpec, knobs: Knobs) -> int:
        return 8 * self._vectors(spec, knobs, grid.tile_rows(spec)) * self._size(knobs) ** 2

    def buffers(self, knobs: Knobs) -> Buffers:
        return Buffers()

    def by_products(self, knobs: Knobs) -> bool:
        return not self.with_base and self._over(knobs) == "tensor"

    def start(
        self,
        spec: TensorSpec,
        knobs: Knobs,
        values: Mapping[str, StatisticValue],
        state_bytes: int,
    ) -> Fold | StatisticValue:
        over = self._over(knobs) if len(spec.shape) > 1 else "tensor"
        return _Products(over, self.with_base, knobs.models, knobs.touching)

    def _over(self, knobs: Knobs) -> Over:
        over: Over = "tensor" if self.over is None else of_shared(self.over, knobs)
        return over

    def _vectors(self, spec: TensorSpec, knobs: Knobs, rows: int) -> int:
        over = self._over(knobs)
        return {"tensor": 1, "each row": rows, "each column": spec.cols}[over]

    def _size(self, knobs: Knobs) -> int:
        return self.with_base + len(knobs.touching)


@dataclass(slots=True)
class _Products:
    """One read of the models, and of the base where it is one of them."""

    over: Over
    with_base: bool
    models: int
    touching: tuple[int, ...]
    total: InnerProducts | None = None
    of_rows: list[InnerProducts] = field(default_factory=list)

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> InnerProducts:
        if self.over == "tensor" and not self.with_base:
            return stack.gram()
        rows = [*([stack.base()] if self.with_base else []), *stack.all()]
        if self.over == "tensor":
            return gram([one.reshape(-1) for one in rows])
        return _by_vector(rows, self.over)

    def absorb(self, tile_index: int, part: InnerProducts) -> None:
        if self.over == "each row":
            self.of_rows.append(part)
        elif self.total is None:
            self.total = part
        else:
            self.total = self.total + part

    def finish(self) -> StatisticValue:
        found = np.concatenate(self.of_rows) if self.of_rows else self.total
        assert found is not None
        first = int(self.with_base)
        places = [*range(first), *(first + model for model in self.touching)]
        whole = np.zeros((*found.shape[:-2], *2 * (first + self.models,)))
        whole[..., np.ix_(places, places)[0], np.ix_(places, places)[1]] = found
        return Same(whole)


def _by_vector(rows: Sequence[Rows], over: Over) -> InnerProducts:
    """`[rows, 1, n, n]` or `[1, cols, n, n]`."""
    axis = int(over == "each row")
    length = rows[0].shape[1 - axis]
    found = np.empty((length, len(rows), len(rows)))
    for i, j in combinations_with_replacement(range(len(rows)), 2):
        found[:, i, j] = products_along(rows[i], rows[j], axis)
        found[:, j, i] = found[:, i, j]
    return np.expand_dims(found, axis)
