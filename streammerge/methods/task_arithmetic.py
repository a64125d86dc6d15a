"""Task vectors added to the base."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, PerModel
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method


@method(reference="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089")
def task_arithmetic(
    deltas: Deltas,
    *,
    weight: Annotated[PerModel, Knob(1.0, "factor of this model's task vector")],
    lambda_: Annotated[float, Knob(1.0, "factor of the merged task vector")],
    normalize: Annotated[bool, Knob(False, "divide by the sum of the weights")],
) -> Coefficients:
    """Base plus lambda times the sum of w_i d_i, d_i being the model minus the base.

    An adapter's d_i is its own update, exactly. With `normalize: true` the sum is divided by
    the sum of all weights, those of models that leave a tensor alone included.
    """
    factor = lambda_ / float(weight.sum()) if normalize else lambda_
    return Coefficients([factor * float(w) for w in weight])
