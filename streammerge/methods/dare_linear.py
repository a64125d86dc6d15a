"""Drop and rescale, add."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import drop, scaled
from streammerge.methods.family import (
    Density,
    Lambda,
    NotDivided,
    ToOldNorm,
    Weight,
    alone_in_sum,
    summed,
)
from streammerge.methods.registry import method
from streammerge.noise import Draws
from streammerge.statistics import Random, Rescaling, TotalWeight


def dropped(deltas: Deltas, density: PerModel, random: Draws) -> Deltas:
    """What chance leaves of each model, in place."""
    return drop(deltas, density, random)


def expected_share(numel: int, density: float) -> float:
    """The share that chance keeps in the mean."""
    return density


@method(reference="Yu et al., DARE, ICML 2024, arXiv 2311.03099", temporaries=0, alone=alone_in_sum)
def dare_linear(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    lambda_: Lambda,
    normalize: NotDivided,
    rescale: ToOldNorm,
    total: TotalWeight,
    random: Random,
    factor: Annotated[PerModel, Rescaling(of=dropped, share=expected_share)],
) -> Rows:
    """Drop elements of each task vector by chance, scale up what stays, and add up.

    Each element of d_i stays with probability density, by a random number of its own, which
    seed, tensor, position of the model in the recipe and index of the element decide. What stays
    is scaled to the old L1 norm of the tensor, or by 1/density as in the paper
    (`rescale: density`, which saves a read); lambda times the sum of w_i d_i is added to the base.
    """
    kept = scaled(drop(deltas, density, random), factor)
    return summed(kept, weight, total, normalize, lambda_)
