"""Norms of rows and columns, and rescaling to others: what DoRA needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.faces import two_faced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import Rows

    Exact = NDArray[np.float64]


@two_faced()
def squares_of_columns(rows: Rows) -> Exact:
    """`[rows, cols]` to the float64 sum of squares of each column, `[cols]`, from top to bottom."""
    from streammerge.kernels import cpu

    sums = np.zeros(rows.shape[1])
    cpu.squares_of_columns(rows, sums)
    return sums


@two_faced()
def norms_of_rows(rows: Rows, added: Rows) -> Exact:
    """The float64 norm of each row of `float32(rows + added)`; both `[rows, cols]`."""
    from streammerge.kernels import cpu

    squares = np.zeros(len(rows))
    cpu.squares_of_summed_rows(rows, added, squares)
    return np.sqrt(squares)


@two_faced()
def rescale_rows(rows: Rows, change: Rows, factors: Exact) -> None:
    """`change = f (rows + change) - rows` in place, f being the row's factor, `factors` `[rows]`.

    Computed as `(f - 1) rows + f change` in float64 and rounded once, so that a factor near one
    does not drown the change in the rows' roundings. Rows and change are `[rows, cols]`.
    """
    from streammerge.kernels import cpu

    cpu.rescale_rows(rows, change, factors)


@two_faced()
def rescale_columns(rows: Rows, change: Rows, factors: Exact) -> None:
    """As `rescale_rows`, each column having its factor, `factors` `[cols]`."""
    from streammerge.kernels import cpu

    cpu.rescale_columns(rows, change, factors)
