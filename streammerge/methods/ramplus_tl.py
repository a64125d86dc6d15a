"""Average what models share, amplify what one has alone."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.declarations import Knob
from streammerge.kernels.contributions import count_contributions, merge_contributions
from streammerge.methods.ram import Epsilon
from streammerge.methods.registry import method
from streammerge.statistics import Sums


def contributions(deltas: Deltas, epsilon: float) -> PerModel:
    """How many elements each model shares, and how many it has alone, `[2, models]`."""
    return count_contributions(deltas, epsilon)


@method(reference="Reinforced Agent Merging, arXiv 2601.13572", temporaries=0)
def ramplus_tl(
    deltas: Deltas,  # [models, rows, cols]
    *,
    epsilon: Epsilon,
    r: Annotated[float, Knob(0.1, "how much to amplify")],
    alpha: Annotated[float, Knob(0.2, "the most that shared over alone counts", at_least=0)],
    counts: Annotated[PerModel, Sums(of=contributions, width=2)],
) -> Rows:
    """As ram; what a model has alone is taken 1 + r min(alpha, shared / alone) times.

    Shared and alone are the numbers of its elements in the tensor that are more than epsilon and
    that others have too, or do not.
    """
    shared, alone = counts
    ratio = shared / np.maximum(alone, epsilon or np.finfo(np.float64).tiny)
    return merge_contributions(deltas, epsilon, 1 + r * np.clip(ratio, 0, alpha))
