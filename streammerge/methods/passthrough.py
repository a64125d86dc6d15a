"""One model as it is, or scaled."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import PerModel, Weights
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method


@method(models=(1, 1))
def passthrough(
    models: Weights,
    *,
    scale: Annotated[PerModel, Knob(1.0, "factor of every element")],
) -> Coefficients:
    """The one model, its adapter applied, times `scale`: bakes an adapter into its base."""
    return Coefficients([float(factor) for factor in scale])
