"""The sign election of TIES (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from streammerge.arrays import Deltas, PerModel, Rows


def elect(deltas: Deltas, weight: PerModel, *, normalize: bool, scale: float = 1.0) -> Rows:
    """The weighted deltas that agree with the elected sign, summed; in place of `deltas[0]`.

    Per element, in float32 and in the order of the models: the sign of `sum w_i d_i` is elected
    (zero counts as plus); the `w_i d_i` of that sign are summed (zeros never agree), divided by
    the float64 sum of their `w_i` if `normalize` (by 1 where that is under 1e-8), times `scale`.

    `deltas` is `[models, rows, cols]`, `weight` `[models]`; the result is `[rows, cols]`.
    """
    from streammerge.kernels import cpu

    models = len(deltas)
    flat = deltas.reshape(models, -1)
    cpu.elect(flat, np.asarray(weight, np.float64), normalize, np.float32(scale), flat[0])
    merged: Rows = deltas[0]
    return merged
