"""Leave out the smallest and the largest, elect sign, merge."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import scaled
from streammerge.methods.breadcrumbs import Gamma, LargeCut, SmallCut, middle
from streammerge.methods.family import (
    Density,
    Dividing,
    Lambda,
    NotDivided,
    Unscaled,
    Voting,
    Weight,
    alone_in_vote,
    kept_share,
    voted,
)
from streammerge.methods.registry import method
from streammerge.statistics import Rescaling


@method(
    reference="Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795",
    temporaries=0,
    alone=alone_in_vote,
)
def breadcrumbs_ties(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    gamma: Gamma,
    lambda_: Lambda,
    normalize: NotDivided,
    rescale: Unscaled,
    vote: Voting,
    divide: Dividing,
    small: SmallCut,
    large: LargeCut,
    factor: Annotated[PerModel, Rescaling(of=middle, share=kept_share)],
) -> Rows:
    """Leave the largest and the smallest elements of each task vector out, and vote on signs.

    As breadcrumbs, with the election of ties in place of the plain sum.
    """
    kept = scaled(middle(deltas, small, large), factor)
    return voted(kept, weight, vote, divide, normalize, lambda_)
