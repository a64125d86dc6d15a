"""The weighted mean of the models."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import PerModel, Weights
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method


@method(reference="Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482")
def linear(
    models: Weights,
    *,
    weight: Annotated[PerModel, Knob(1.0, "share of this model in the mean")],
    normalize: Annotated[bool, Knob(True, "divide by the sum of the weights")],
) -> Coefficients:
    """Weighted mean of the listed models: sum of w_i x_i, divided by the sum of w_i.

    For adapters of the base alone this is base + sum of (w_i / sum w) d_i; the base itself
    takes part only if it is listed. With `normalize: false` the models are summed as they are,
    so the base is scaled by the sum of the weights: use task_arithmetic to add adapters up.
    """
    total = float(weight.sum()) if normalize else 1.0
    return Coefficients([float(w) / total for w in weight])
