"""Trim, elect sign, merge."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import Cut, scaled, trim
from streammerge.methods.family import (
    Density,
    Dividing,
    Equals,
    Lambda,
    OverAgreeing,
    Unscaled,
    Voting,
    Weight,
    alone_in_vote,
    kept_share,
    trimmed,
    voted,
)
from streammerge.methods.registry import method
from streammerge.statistics import KthMagnitude, Rescaling


@method(
    reference="Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708",
    temporaries=0,
    alone=alone_in_vote,
)
def ties(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    lambda_: Lambda,
    normalize: OverAgreeing,
    rescale: Unscaled,
    vote: Voting,
    divide: Dividing,
    ties: Equals,
    cut: Annotated[Cut, KthMagnitude(keep="density", equals="ties")],
    factor: Annotated[PerModel, Rescaling(of=trimmed, share=kept_share)],
) -> Rows:
    """Keep each task vector's largest elements, vote on signs, and average what agrees.

    Of each d_i the max(1, int(density * elements)) largest magnitudes of the tensor stay (of
    equal ones the lowest index). The sign of sum w_i d_i is elected per element; those of that
    sign are summed, divided by the sum of their weights if `normalize`, times lambda, plus base.
    An adapter that does not touch a tensor has no say there, so an element that one adapter
    alone keeps is taken at its full strength. The paper votes unweighted and divides by count.
    """
    kept = scaled(trim(deltas, cut), factor)
    return voted(kept, weight, vote, divide, normalize, lambda_)
