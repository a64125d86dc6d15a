"""Select, calculate, erase."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.declarations import Knob
from streammerge.kernels import Cut, elect, trim
from streammerge.kernels.contributions import variance, zero_where_zero
from streammerge.kernels.product import gram
from streammerge.methods.registry import method
from streammerge.statistics import ElementCount, KthValue, ModelCount, Sums

_LEAST_SUM = 1e-6
_LEAST_DIVISOR = 1e-6


def spread(deltas: Deltas, models: int) -> Rows:
    """The variance of each element over the models."""
    return variance(deltas, models)


def selected_elements(nonzero: int, select_topk: float) -> int:
    """How many elements are selected, of those whose variance is not zero."""
    return int(select_topk * nonzero)


def all_selected(select_topk: float) -> bool:
    """Whether there is nothing to select."""
    return select_topk >= 1


def selected(deltas: Deltas, models: int, cut: Cut) -> Deltas:
    """The deltas where the models differ most, in place."""
    if cut.thresholds[0] == 0:
        return deltas
    marks = variance(deltas, models)
    trim(marks[None], cut)
    return zero_where_zero(deltas, marks)


def squares(deltas: Deltas, models: int, cut: Cut) -> PerModel:
    """The squared length of what is selected of each model."""
    kept = selected(deltas, models, cut).reshape(len(deltas), -1)
    return np.diagonal(gram(kept))


@method(reference="Wan et al., FuseChat (SCE), arXiv 2408.07990", temporaries=1)
def sce(
    deltas: Deltas,  # [models, rows, cols]
    *,
    select_topk: Annotated[float, Knob(1.0, "share of elements to select", at_least=0, up_to=1)],
    models: ModelCount,
    elements: ElementCount,
    cut: Annotated[
        Cut, KthValue(of=spread, counts=(selected_elements,), unless=all_selected, temporaries=1)
    ],
    squared: Annotated[PerModel, Sums(of=squares, temporaries=1)],
) -> Rows:
    """Where the models differ most, average what agrees, by how much each model changed.

    The int(select_topk * n) elements of highest variance over the models are selected, n being
    those whose variance is not zero (of equal ones the lowest index). A model's weight is the
    mean square of what is selected of its d_i over the tensor, divided by the sum of all
    (alike where that is under 1e-6, as for small updates). The sign of sum d_i is elected per
    element; the w_i d_i of that sign are summed, divided by their w_i (at least 1e-6), plus base.
    """
    mean_squares = squared / elements
    total = float(mean_squares.sum())
    alike = np.full(len(deltas), 1 / models)
    weight = alike if total < _LEAST_SUM else mean_squares / total
    kept = selected(deltas, models, cut)
    return elect(kept, weight, vote="unweighted", least_divisor=_LEAST_DIVISOR)
