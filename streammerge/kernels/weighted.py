"""Sums of rows, weighted or not, into a buffer that the caller owns; and norms for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.faces import two_faced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import Deltas, PerModel, Rows


@two_faced()
def add(rows: Rows, others: Rows, out: Rows) -> None:
    """`out = rows + others`; all `[rows, cols]`, `out` may be either."""
    np.add(rows, others, out=out)


@two_faced()
def subtract(rows: Rows, others: Rows, out: Rows) -> None:
    """`out = rows - others`; all `[rows, cols]`, `out` may be either."""
    np.subtract(rows, others, out=out)


@two_faced()
def copy(rows: Rows, out: Rows) -> None:
    """`out = rows`, both `[rows, cols]`."""
    np.copyto(out, rows)


@two_faced()
def fill(out: Rows, value: float) -> None:
    """Every element of `out` becomes float32(value)."""
    out.fill(value)


@two_faced()
def multiply_by(rows: Rows, factors: NDArray[np.float64]) -> None:
    """`rows *= float32(factors)`: of each row `[rows, 1]`, or of each column `[1, cols]`."""
    np.multiply(rows, factors.astype(np.float32), out=rows)


@two_faced()
def add_scaled(out: Rows, factor: float, rows: Rows) -> None:
    """`out += float32(factor) * rows`; all `[rows, cols]`."""
    from streammerge.kernels import cpu

    cpu.add_scaled(out.reshape(-1), np.float32(factor), rows.reshape(-1))


@two_faced()
def sum_of_squares(rows: Rows) -> float:
    """The squared Frobenius norm, in float64."""
    from streammerge.kernels import cpu

    return float(cpu.sum_of_squares(rows.reshape(-1)))


@two_faced()
def sum_of_squared_differences(rows: Rows, base: Rows) -> float:
    """The squared Frobenius norm of the difference, in float64."""
    from streammerge.kernels import cpu

    return float(cpu.sum_of_squared_differences(rows.reshape(-1), base.reshape(-1)))


@two_faced()
def sum_of_magnitudes(rows: Rows) -> float:
    """The L1 norm, in float64, always summed in the same order."""
    from streammerge.kernels import cpu

    return float(cpu.sum_of_magnitudes(rows.reshape(-1)))


@two_faced()
def take_up_to(delta: Rows, most: float, least: float) -> Rows:
    """`delta * clip(most / max(|delta|, least), 0, 1)` in float32, in place; `[rows, cols]`."""
    share = np.abs(delta)
    np.maximum(share, np.float32(least), out=share)
    np.divide(np.float32(most), share, out=share)
    np.clip(share, 0, 1, out=share)
    np.multiply(delta, share, out=delta)
    return delta


def add_up(deltas: Deltas, weight: PerModel, scale: float = 1.0) -> Rows:
    """`scale` times the sum of `w_i d_i`, in float32 and in order; in place of `deltas[0]`."""
    merged: Rows = deltas[0]
    merged *= np.float32(weight[0])
    for delta, factor in zip(deltas[1:], weight.tolist()[1:], strict=True):
        add_scaled(merged, factor, delta)
    merged *= np.float32(scale)
    return merged


def scaled(deltas: Deltas, factors: PerModel) -> Deltas:
    """Each model times its factor, in place; returns `deltas`."""
    for delta, factor in zip(deltas, factors.tolist(), strict=True):
        if factor != 1:
            delta *= np.float32(factor)
    return deltas
