"""Low-rank updates of one tensor in a common basis: the core space.

Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025
(arXiv 2509.17786). With the left factors side by side, L `[rows, R]`, and the right ones under each
other, `[R, cols]`, U and V are orthonormal bases of all their columns and rows. Each update is
`U M_i V'` with a core matrix M_i of at most `[R, R]`, and nothing is lost.

Neither basis is formed: `U = L @ to_left` and `V' = to_right' @ right`, and both maps follow from
the triangles of two QR decompositions that stream over blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from streammerge.errors import BadInput
from streammerge.kernels.spectral import basis, triangle
from streammerge.scratch import Scratch
from streammerge.sources.low_rank import Product
from streammerge.words import Factors, Matrix, Source, Tile

if TYPE_CHECKING:
    from streammerge.arrays import Core, PerModel

# Rows or columns that are decomposed at once; part of the arithmetic, so no setting.
BLOCK = 1024


@dataclass(frozen=True, slots=True)
class LowRank:
    """The updates of a tensor by `count` models, factor i being that of model `models[i]`."""

    factors: tuple[Factors, ...]
    models: tuple[int, ...]
    count: int

    @property
    def rows(self) -> int:
        return self.factors[0].left.rows

    @property
    def cols(self) -> int:
        return self.factors[0].right.cols

    @property
    def rank(self) -> int:
        """The sum of their ranks, and the most that their sum can have."""
        return sum(pair.rank for pair in self.factors)

    def turned(self) -> LowRank:
        """Of the transposed tensor."""
        return replace(self, factors=tuple(pair.turned() for pair in self.factors))

    def by_model(self, of_factors: PerModel) -> PerModel:
        """Sums over the factors of each model."""
        return np.bincount(self.models, of_factors, self.count).astype(np.float64)


def low_rank(base: Source | None, models: Sequence[Source]) -> LowRank | None:
    """The updates of models that are the base with products; None where one is anything else."""
    terms = [model.terms() for model in models]
    if base is None or not all(one.rows is base for one in terms):
        return None
    factors = tuple(pair for one in terms for pair in one.factors)
    owners = tuple(i for i, one in enumerate(terms) for _ in one.factors)
    return LowRank(factors, owners, len(models)) if factors else None


@dataclass(frozen=True, slots=True)
class CoreSpace:
    """What the factors of some models come to."""

    to_left: Core  # [R, left basis]
    to_right: Core  # [R, right basis]
    cores: Core  # [models, left basis, right basis]


def core_space(product: Product, updates: LowRank) -> CoreSpace:
    """The common basis of some updates, whose product reads them.

    Reads every left factor once. Raises BadInput where a factor holds a value that is not finite.
    """
    rank = updates.rank
    to_left, in_left = basis(triangle(_left_blocks(product, updates.rows), rank))
    to_right, in_right = basis(triangle(_right_blocks(product), rank))
    cores = np.zeros((updates.count, len(in_left), len(in_right)))
    start = 0
    for pair, model in zip(updates.factors, updates.models, strict=True):
        own = slice(start, start + pair.rank)
        cores[model] += pair.scale * in_left[:, own] @ in_right[:, own].T
        start += pair.rank
    return CoreSpace(to_left, to_right, cores)


def core_bytes(updates: LowRank) -> int:
    """Working memory of `core_space`, what reading a block takes not counted."""
    rank = updates.rank
    block = 8 * (3 * BLOCK + 2 * rank) * rank  # in float64, stacked, and as LAPACK has it
    return max(block, 8 * (10 + updates.count) * rank**2) + 8 * 2 * rank**2


def _left_blocks(product: Product, rows: int) -> Iterator[Core]:
    scratch = Scratch()
    for start in range(0, rows, BLOCK):
        tile = Tile(start, min(start + BLOCK, rows))
        block = product.left(tile, scratch).astype(np.float64)
        _refuse_not_finite(block, {pair.left: pair.rank for pair in product.factors})
        yield block


def _right_blocks(product: Product) -> Iterator[Core]:
    right = product.right(Scratch())
    for start in range(0, right.shape[1], BLOCK):
        block = right[:, start : start + BLOCK].T.astype(np.float64)
        _refuse_not_finite(block, {pair.right: pair.rank for pair in product.factors})
        yield block


def _refuse_not_finite(block: Core, ranks: Mapping[Matrix, int]) -> None:
    """`block` is `[n, R]`, a factor of each rank in turn; LAPACK would not say whose they are."""
    spoiled = ~np.isfinite(block).all(axis=0)
    if not spoiled.any():
        return
    ends = np.cumsum(list(ranks.values()))
    whose = list(ranks)[int(np.searchsorted(ends, np.argmax(spoiled), side="right"))]
    raise BadInput(
        f"{whose.extent.spec.name} has values that are NaN or infinite",
        where=whose.extent.path,
        remedy="fetch or train that adapter again, or leave it out",
    )
