"""Drop by rank and rescale, add."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.declarations import Knob
from streammerge.kernels import drop_by_rank, scaled
from streammerge.methods.family import (
    Density,
    Lambda,
    NotDivided,
    Rescale,
    ToOldNorm,
    Weight,
    alone_in_sum,
    summed,
)
from streammerge.methods.registry import method
from streammerge.noise import Draws
from streammerge.statistics import Random, Rescaling, TotalWeight

Epsilon = Annotated[
    PerModel,
    Knob(
        0.15, "density less this for the smallest of a row, plus this for the largest", at_least=0
    ),
]


def dropped_by_rank(
    deltas: Deltas, density: PerModel, epsilon: PerModel, rescale: Rescale, random: Draws
) -> Deltas:
    """What chance by rank leaves of each model, in place."""
    return drop_by_rank(deltas, density, epsilon, random, divide=rescale == "density")


def within_bounds(density: float, epsilon: float) -> str | None:
    """What is wrong with the two together, if anything."""
    if density == 1 or (density - epsilon > 0 and density + epsilon < 1):
        return None
    return (
        f"probabilities from {density - epsilon:g} to {density + epsilon:g}, which are density "
        "less and plus epsilon, must lie between 0 and 1"
    )


@method(
    reference="Deep et al., DELLA-Merging, arXiv 2406.11617",
    temporaries=2,
    nanoseconds=5,
    check=within_bounds,
    alone=alone_in_sum,
)
def della_linear(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Weight,
    density: Density,
    epsilon: Epsilon,
    lambda_: Lambda,
    normalize: NotDivided,
    rescale: ToOldNorm,
    total: TotalWeight,
    random: Random,
    factor: Annotated[PerModel, Rescaling(of=dropped_by_rank, temporaries=2)],
) -> Rows:
    """Drop elements of each task vector by chance, small ones more often, and add up.

    Ranked by magnitude within its row, an element of d_i stays with a probability from
    density - epsilon (the smallest) to density + epsilon (the largest); alone in its row, with
    density. A tensor of one dimension is one row. What stays is scaled to the old L1 norm of the
    tensor, or each by its own probability (`rescale: density`, as in the paper); lambda times
    the sum of w_i d_i is added to the base.
    """
    kept = scaled(dropped_by_rank(deltas, density, epsilon, rescale, random), factor)
    return summed(kept, weight, total, normalize, lambda_)
