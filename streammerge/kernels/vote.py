"""The sign election of TIES (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from streammerge.kernels.faces import two_faced

if TYPE_CHECKING:
    from streammerge.arrays import Deltas, PerModel, Rows

# Signs of `sum w_i d_i`, of `sum d_i` (the paper), or of the number of `w_i d_i` of each sign.
Vote = Literal["weighted", "unweighted", "count"]
# What agrees is divided by nothing, by the sum of its weights, or by how many agree (the paper).
Divisor = Literal["none", "weights", "count"]


@two_faced()
def elect(
    deltas: Deltas,
    weight: PerModel,
    *,
    vote: Vote = "weighted",
    divide: Divisor = "weights",
    scale: float = 1.0,
    least_divisor: float = 0.0,
) -> Rows:
    """The weighted deltas that agree with the elected sign, summed; in place of `deltas[0]`.

    Per element, in float32 and in the order of the models: a sign is elected (zero counts as
    plus); the `w_i d_i` of that sign are summed (where the vote is unweighted, those whose `d_i`
    has it; zeros never agree), divided by the float64 sum of their `w_i` or by their number (by 1
    where that is under 1e-8; by `least_divisor` at least, where that is given), times `scale`.

    `deltas` is `[models, rows, cols]`, `weight` `[models]`; the result is `[rows, cols]`.
    """
    from streammerge.kernels import cpu_stack

    models = len(deltas)
    flat = deltas.reshape(models, -1)
    weights = np.asarray(weight, np.float64)
    mode, by = get_args(Vote).index(vote), get_args(Divisor).index(divide)
    cpu_stack.elect(flat, weights, mode, by, least_divisor, np.float32(scale), flat[0])
    merged: Rows = deltas[0]
    return merged
