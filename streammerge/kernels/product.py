"""The product of a band: some rows of `left @ right` by one BLAS call.

A band is not bit-equal to the same rows of the whole product, so callers cut bands by the tile
grid only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.faces import two_faced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import InnerProducts, PerModel, Rows

# Rows of which one loop makes all products faster than BLAS.
_FEW = 8
# What BLAS is handed at once, in float64: stays in the cache, and in memory that malloc keeps.
_BLOCK_ELEMENTS = 1 << 14
_LEAST_COLUMNS = 1024


@two_faced()
def multiply(left: Rows, right: Rows, out: Rows) -> None:
    """`out = left @ right`: `[rows, rank] @ [rank, cols] -> [rows, cols]`."""
    np.matmul(left, right, out=out)


@two_faced()
def gram(rows: Rows | Sequence[NDArray[np.float32]]) -> InnerProducts:
    """`rows @ rows.T` in float64, `[n, cols] -> [n, n]`, of rows in one array or in several."""
    if len(rows) > _FEW:
        return _gram_of_many(rows)
    from streammerge.kernels import cpu_stack

    firsts, seconds = np.tril_indices(len(rows))
    sums = np.zeros((len(firsts), cpu_stack.SUMS))
    if isinstance(rows, np.ndarray):
        cpu_stack.inner_products(rows, sums)
    else:
        for i, j, one in zip(firsts.tolist(), seconds.tolist(), sums, strict=True):
            cpu_stack.inner_product(rows[i], rows[j], one)
    found = np.empty((len(rows),) * 2)
    found[firsts, seconds] = found[seconds, firsts] = sums.sum(axis=1)
    return found


def _gram_of_many(rows: Rows | Sequence[NDArray[np.float32]]) -> InnerProducts:
    """By BLAS, over blocks of columns."""
    total = np.zeros((len(rows), len(rows)))
    step = max(_LEAST_COLUMNS, _BLOCK_ELEMENTS // len(rows))
    block = np.empty((len(rows), min(step, len(rows[0]))))
    for start in range(0, len(rows[0]), step):
        held = block[:, : len(rows[0]) - start]
        for i, row in enumerate(rows):
            held[i] = row[start : start + step]
        total += held @ held.T
    return total


@two_faced()
def products_along(rows: Rows, others: Rows, axis: int) -> PerModel:
    """Inner products in float64: of each row with the other's for axis 1, of each column for 0."""
    form = "rc,rc->r" if axis else "rc,rc->c"
    return np.asarray(np.einsum(form, rows, others, dtype=np.float64), np.float64)


@two_faced()
def thinned(matrix: Rows, step: int) -> Rows:
    """Every `step`-th column, side by side in memory."""
    return np.ascontiguousarray(matrix[:, ::step])


@two_faced()
def squared_norms(
    left: Rows, right_grams: list[NDArray[np.float64]], scales: list[float]
) -> PerModel:
    """Squared Frobenius norm of each `scale_i * left_i @ right_i`, without forming the product.

    `left` is `[rows, sum of ranks]`, the left factors side by side; `right_grams[i]` is
    `right_i @ right_i.T`. The norm is the trace of `(left_i.T @ left_i) @ right_gram_i`.
    """
    norms, start = [], 0
    for right_gram, scale in zip(right_grams, scales, strict=True):
        band = left[:, start : start + len(right_gram)]
        with np.errstate(invalid="ignore", over="ignore"):  # said when the tile is written
            left_gram = (band.T @ band).astype(np.float64)
            norms.append(scale * scale * float(np.sum(left_gram * right_gram)))
        start += len(right_gram)
    return np.array(norms, np.float64)
