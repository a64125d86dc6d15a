"""What the models of an element have to do with each other: variance, and who contributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.faces import two_faced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import Deltas, PerModel, Rows


@two_faced()
def variance(deltas: Deltas, models: int) -> Rows:
    """Population variance over `models` models, `[models there, rows, cols] -> [rows, cols]`.

    Those that are not there count as zeros. In float64, rounded once.
    """
    from streammerge.kernels import cpu_stack

    out: Rows = np.empty(deltas.shape[1:], np.float32)
    cpu_stack.variance(deltas.reshape(len(deltas), -1), models, out.reshape(-1))
    return out


@two_faced()
def zero_where_zero(deltas: Deltas, marks: Rows) -> Deltas:
    """Zero every model where the mark is zero, in place; returns `deltas`."""
    from streammerge.kernels import cpu_stack

    cpu_stack.zero_where_zero(deltas.reshape(len(deltas), -1), marks.reshape(-1))
    return deltas


@two_faced()
def count_contributions(deltas: Deltas, epsilon: float) -> NDArray[np.float64]:
    """`[2, models]`: how many elements above epsilon are shared, and how many a model's alone."""
    from streammerge.kernels import cpu_stack

    counts = np.zeros(2 * len(deltas))
    flat = deltas.reshape(len(deltas), -1)
    cpu_stack.count_contributions(flat, np.float32(epsilon), counts)
    return counts.reshape(2, -1)


@two_faced()
def merge_contributions(deltas: Deltas, epsilon: float, alone: PerModel) -> Rows:
    """Per element the mean of the deltas whose magnitude is above epsilon.

    Where that is one alone, it is taken times its model's factor in `alone`. In place of
    `deltas[0]`.
    """
    from streammerge.kernels import cpu_stack

    flat = deltas.reshape(len(deltas), -1)
    cpu_stack.merge_contributions(flat, np.float32(epsilon), alone, flat[0])
    merged: Rows = deltas[0]
    return merged


@two_faced()
def importance(delta: Rows, base: Rows) -> Rows:
    """|difference| times the Kullback-Leibler divergence of soft-maxed rows, `[rows, cols]`.

    Of the model from the base, 1e-8 added to every share; in float64, rounded once.
    """
    from streammerge.kernels import cpu_stack

    out: Rows = np.empty(delta.shape, np.float32)
    cpu_stack.importance(delta, base, out)
    return out


@two_faced()
def zero_below(delta: Rows, marks: Rows, least: float) -> Rows:
    """Zero the elements whose mark is under `least`, compared in float64; in place."""
    from streammerge.kernels import cpu_stack

    cpu_stack.zero_below(delta.reshape(-1), marks.reshape(-1), least)
    return delta
