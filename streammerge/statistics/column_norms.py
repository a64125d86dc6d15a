"""The Euclidean norm of every column of a tensor, as a fold over tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.norms import squares_of_columns
from streammerge.scratch import Scratch
from streammerge.words import DeltaStack, TensorSpec, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Exact = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ColumnNorms:
    """The value: `norms` is `[cols]`, float64."""

    norms: Exact

    def at(self, tile_index: int) -> Exact:
        """The same for every tile: a tile has all columns."""
        return self.norms


class ColumnSquares:
    """Sums of squares of the first model's columns, in float64, tiles added in grid order."""

    def __init__(self, spec: TensorSpec) -> None:
        self._sums: Exact = np.zeros(spec.cols)

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> Exact:
        return squares_of_columns(stack.one(0))

    def absorb(self, tile_index: int, part: Exact) -> None:
        self._sums += part

    def finish(self) -> ColumnNorms:
        return ColumnNorms(np.sqrt(self._sums))
