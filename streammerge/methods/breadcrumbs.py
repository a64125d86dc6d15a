"""Leave out the smallest and the largest, add."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.declarations import Knob
from streammerge.kernels import Cut, drop_largest, scaled, trim
from streammerge.methods.family import (
    Density,
    Lambda,
    NotDivided,
    Unscaled,
    Weight,
    alone_in_sum,
    kept_share,
    summed,
)
from streammerge.methods.registry import method
from streammerge.statistics import KthMagnitude, Rescaling, TotalWeight
from streammerge.statistics.kth_magnitude import largest

Gamma = Annotated[
    PerModel, Knob(0.01, "share of elements, the largest, to leave out", at_least=0, below=1)
]


def not_small(numel: int, density: float, gamma: float) -> int:
    """How many are left when the smallest are gone: what is kept, and the largest."""
    return numel if density >= 1 else min(numel, largest(numel, density) + int(gamma * numel))


def outliers(numel: int, density: float, gamma: float) -> int:
    """How many of the largest go; fewer where the smallest are too few for the density."""
    return 0 if density >= 1 else not_small(numel, density, gamma) - largest(numel, density)


SmallCut = Annotated[Cut, KthMagnitude(keep="density", count=not_small)]
LargeCut = Annotated[Cut, KthMagnitude(keep="density", count=outliers)]


def middle(deltas: Deltas, small: Cut, large: Cut) -> Deltas:
    """What stays of each model, in place."""
    return drop_largest(trim(deltas, small), large)


@method(
    reference="Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795",
    temporaries=0,
    alone=alone_in_sum,
)
def breadcrumbs(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    gamma: Gamma,
    lambda_: Lambda,
    normalize: NotDivided,
    rescale: Unscaled,
    total: TotalWeight,
    small: SmallCut,
    large: LargeCut,
    factor: Annotated[PerModel, Rescaling(of=middle, share=kept_share)],
) -> Rows:
    """Leave the largest and the smallest elements of each task vector out, and add up.

    Of each d_i the int(gamma * elements) largest magnitudes go, then the smallest, until
    max(1, int(density * elements)) are left; where the smallest are too few for that, fewer of
    the largest go. Of equal magnitudes the lower index counts as the larger. Lambda times the sum
    of w_i d_i is added to the base.
    """
    kept = scaled(middle(deltas, small, large), factor)
    return summed(kept, weight, total, normalize, lambda_)
