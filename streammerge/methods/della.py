"""Drop by rank and rescale, elect sign, merge."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import scaled
from streammerge.methods.della_linear import Epsilon, dropped_by_rank, within_bounds
from streammerge.methods.family import (
    Density,
    Dividing,
    Lambda,
    OverAgreeing,
    ToOldNorm,
    Voting,
    Weight,
    alone_in_vote,
    voted,
)
from streammerge.methods.registry import method
from streammerge.statistics import Random, Rescaling


@method(
    reference="Deep et al., DELLA-Merging, arXiv 2406.11617",
    temporaries=2,
    nanoseconds=5,
    check=within_bounds,
    alone=alone_in_vote,
)
def della(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    epsilon: Epsilon,
    lambda_: Lambda,
    normalize: OverAgreeing,
    rescale: ToOldNorm,
    vote: Voting,
    divide: Dividing,
    random: Random,
    factor: Annotated[PerModel, Rescaling(of=dropped_by_rank, temporaries=2)],
) -> Rows:
    """Drop elements of each task vector by chance, small ones more often, and vote on signs.

    As della_linear, with the election of ties in place of the plain sum.
    """
    kept = scaled(dropped_by_rank(deltas, density, epsilon, rescale, random), factor)
    return voted(kept, weight, vote, divide, normalize, lambda_)
