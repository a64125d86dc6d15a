"""Trim and add."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import Cut, scaled, trim
from streammerge.methods.family import (
    Density,
    Equals,
    Lambda,
    NotDivided,
    Unscaled,
    Weight,
    alone_in_sum,
    kept_share,
    summed,
    trimmed,
)
from streammerge.methods.registry import method
from streammerge.statistics import KthMagnitude, Rescaling, TotalWeight


@method(reference="PEFT, add_weighted_adapter (magnitude_prune)", temporaries=0, alone=alone_in_sum)
def magnitude_prune(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    lambda_: Lambda,
    normalize: NotDivided,
    rescale: Unscaled,
    ties: Equals,
    total: TotalWeight,
    cut: Annotated[Cut, KthMagnitude(keep="density", equals="ties")],
    factor: Annotated[PerModel, Rescaling(of=trimmed, share=kept_share)],
) -> Rows:
    """Keep each task vector's largest elements, and add them up without a vote.

    Of each d_i the max(1, int(density * elements)) largest magnitudes of the tensor stay (of
    equal ones the lowest index); lambda times the sum of w_i d_i is added to the base.
    """
    return summed(scaled(trim(deltas, cut), factor), weight, total, normalize, lambda_)
