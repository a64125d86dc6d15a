"""Drop and rescale, elect sign, merge."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import drop, scaled
from streammerge.methods.dare_linear import dropped, expected_share
from streammerge.methods.family import (
    Density,
    Dividing,
    Lambda,
    NotDivided,
    ToOldNorm,
    Voting,
    Weight,
    alone_in_vote,
    voted,
)
from streammerge.methods.registry import method
from streammerge.statistics import Random, Rescaling


@method(
    reference="Yu et al., DARE, ICML 2024, arXiv 2311.03099", temporaries=0, alone=alone_in_vote
)
def dare_ties(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    lambda_: Lambda,
    normalize: NotDivided,
    rescale: ToOldNorm,
    vote: Voting,
    divide: Dividing,
    random: Random,
    factor: Annotated[PerModel, Rescaling(of=dropped, share=expected_share)],
) -> Rows:
    """Drop elements of each task vector by chance, scale up what stays, and vote on signs.

    As dare_linear, with the election of ties in place of the plain sum.
    """
    kept = scaled(drop(deltas, density, random), factor)
    return voted(kept, weight, vote, divide, normalize, lambda_)
