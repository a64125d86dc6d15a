"""The directions in which a matrix is strongest, from a few reads of it.

Halko, Martinsson and Tropp, "Finding structure with randomness: probabilistic algorithms for
constructing approximate matrix decompositions", SIAM Review 2011: random vectors multiplied by
`D'D`, again and again, turn to the strongest right singular vectors of D. Each round is one read,
tile by tile: `D'D Q` is the sum of `D_t' (D_t Q)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streammerge.errors import BadInput
from streammerge.noise import key_of
from streammerge.scratch import Scratch
from streammerge.words import DeltaStack, Fold, StatisticValue, TensorSpec, Tile

if TYPE_CHECKING:
    from streammerge.arrays import Core, Rows

# Two rounds multiply the random vectors by (D'D)^2, which is one and a half power iterations; ten
# vectors more than asked for are the paper's usual choice.
ROUNDS = 2
_MORE = 10
# Of the sum, its decomposition, and LAPACK's working copies.
_COPIES = 4


@dataclass(frozen=True, slots=True)
class Directions:
    """Orthonormal rows `[rank, cols]`, the strongest first."""

    rows: Rows

    def at(self, tile_index: int) -> Rows:
        return self.rows


def width(spec: TensorSpec, rank: int) -> int:
    """How many vectors are turned at once."""
    return min(rank + _MORE, spec.rows, spec.cols)


def state_bytes(spec: TensorSpec, rank: int) -> int:
    return 8 * _COPIES * spec.cols * width(spec, rank)


def part_bytes(spec: TensorSpec, rank: int) -> int:
    return 4 * spec.cols * width(spec, rank)


def first_round(spec: TensorSpec, rank: int, seed: int) -> Turned:
    """Begin with Gaussian vectors, drawn for the tensor by name when they are wanted."""

    def draw() -> Rows:
        random = np.random.Generator(np.random.Philox(key_of(seed, spec.name, -1)))
        return random.standard_normal((spec.cols, width(spec, rank)), np.float32)

    return Turned(spec, rank, ROUNDS, draw)


class Turned:
    """One round; see `Fold`. What it measures is the only model of the stack."""

    def __init__(
        self, spec: TensorSpec, rank: int, rounds: int, vectors: Callable[[], Rows]
    ) -> None:
        """`rounds` counts this one; `vectors` are `[cols, width]`, the same whenever asked."""
        self._spec = spec
        self._rank = rank
        self._rounds = rounds
        self._make = vectors
        self._vectors: Rows | None = None
        self._sum: Core = np.zeros((spec.cols, width(spec, rank)))

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> Rows:
        """`D_t' (D_t Q)`, `[cols, width]`."""
        rows = stack.one(0)
        if self._vectors is None:
            self._vectors = self._make()
        seen: Rows = scratch.array("seen", (len(rows), self._vectors.shape[1]), np.float32)
        np.matmul(rows, self._vectors, out=seen)
        return np.asarray(rows.T @ seen)

    def absorb(self, tile_index: int, part: Rows) -> None:
        self._sum += part

    def finish(self) -> Fold | StatisticValue:
        if not np.isfinite(self._sum).all():
            raise BadInput(
                "the merged update has values that are NaN or infinite, or too large to square",
                where=self._spec.name,
                remedy="look for the input that holds them with `streammerge inspect`",
            )
        if self._rounds > 1:
            turned = np.linalg.qr(self._sum)[0].astype(np.float32)
            return Turned(self._spec, self._rank, self._rounds - 1, lambda: turned)
        u = np.linalg.svd(self._sum, full_matrices=False)[0]
        return Directions(np.ascontiguousarray(u[:, : self._rank].T, np.float32))
