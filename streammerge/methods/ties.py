"""Trim, elect sign, merge."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel, Rows
from streammerge.kernels import Cut, elect, trim
from streammerge.methods.registry import method
from streammerge.statistics import KthMagnitude
from streammerge.words import Knob


@method(reference="Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708", temporaries=0)
def ties(
    deltas: Deltas,  # [models, rows, cols]
    *,
    weight: Annotated[PerModel, Knob(1.0, "factor of this model's task vector")],
    density: Annotated[PerModel, Knob(1.0, "share of elements to keep", above=0, up_to=1)],
    lambda_: Annotated[float, Knob(1.0, "factor of the merged task vector")],
    normalize: Annotated[bool, Knob(True, "divide by the weights that agree")],
    cut: Annotated[Cut, KthMagnitude(keep="density")],
) -> Rows:
    """Keep each task vector's largest elements, vote on signs, and average what agrees.

    Of each d_i the max(1, int(density * elements)) largest magnitudes of the tensor stay (of
    equal ones the lowest index). The sign of sum w_i d_i is elected per element; those of that
    sign are summed, divided by the sum of their weights if `normalize`, times lambda, plus base.
    An adapter that does not touch a tensor has no say there, so an element that one adapter
    alone keeps is taken at its full strength.
    """
    return elect(trim(deltas, cut), weight, normalize=normalize, scale=lambda_)
