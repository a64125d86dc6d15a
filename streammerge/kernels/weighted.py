"""Sums of weighted rows, into a buffer that the caller owns; and norms for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from streammerge.arrays import Rows


def add_scaled(out: Rows, factor: float, rows: Rows) -> None:
    """`out += float32(factor) * rows`; all `[rows, cols]`."""
    from streammerge.kernels import cpu

    cpu.add_scaled(out.reshape(-1), np.float32(factor), rows.reshape(-1))


def sum_of_squares(rows: Rows) -> float:
    """The squared Frobenius norm, in float64."""
    from streammerge.kernels import cpu

    return float(cpu.sum_of_squares(rows.reshape(-1)))


def sum_of_squared_differences(rows: Rows, base: Rows) -> float:
    """The squared Frobenius norm of the difference, in float64."""
    from streammerge.kernels import cpu

    return float(cpu.sum_of_squared_differences(rows.reshape(-1), base.reshape(-1)))
