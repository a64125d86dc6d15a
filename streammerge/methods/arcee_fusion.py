"""Take only what changed most."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Base, Deltas, Rows
from streammerge.kernels import Cut, contributions
from streammerge.kernels.contributions import zero_below
from streammerge.kernels.prune import magnitude_of
from streammerge.methods.registry import method
from streammerge.statistics import KthValue


def importance(deltas: Deltas, base: Rows) -> Rows:
    """Of each element of the one model."""
    return contributions.importance(deltas[0], base)


def upper_quartile(numel: int) -> int:
    """How many lie at or above it."""
    return numel - int(0.75 * (numel - 1))


def median(numel: int) -> int:
    """How many lie at or above it."""
    return numel - int(0.5 * (numel - 1))


def lower_quartile(numel: int) -> int:
    """How many lie at or above it."""
    return numel - int(0.25 * (numel - 1))


@method(models=(1, 1), reference="Arcee Fusion, arcee.ai", temporaries=1, nanoseconds=54)
def arcee_fusion(
    deltas: Deltas,  # [1, rows, cols]
    *,
    base: Base,
    cut: Annotated[
        Cut,
        KthValue(
            of=importance,
            counts=(upper_quartile, median, lower_quartile),
            whole_rows=True,
            temporaries=1,
        ),
    ],
) -> Rows:
    """The base plus the model's differences whose importance stands out.

    Importance is |d| times the Kullback-Leibler divergence of the element's row from the base's,
    both soft-maxed. Those at or above median + 1.5 (upper - lower quartile) of the tensor are
    taken; the quartiles are exact, whatever the size.
    """
    upper, middle, lower = (magnitude_of(key) for key in cut.thresholds)
    least = middle + 1.5 * (upper - lower)
    return zero_below(deltas[0], importance(deltas, base), least)
