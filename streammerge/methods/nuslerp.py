"""Along the arc between two models."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import InnerProducts, PerModel, Vectors
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method
from streammerge.methods.spherical import between, norms
from streammerge.statistics import Gram
from streammerge.statistics.gram import Over

_LEAST_SUM = 1e-6
_LEAST_NORM = 1e-7
_LEAST_SINE = 1e-6  # under it, float32 inputs tell no direction from one to the other


def _over(nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Over:
    if nuslerp_flatten:
        return "tensor"
    return "each column" if nuslerp_row_wise else "each row"


@method(models=(2, 2), reference="mergekit, NuSLERP")
def nuslerp(
    models: Vectors,
    *,
    weight: Annotated[PerModel, Knob(1.0, "pull of this model; only their ratio counts")],
    nuslerp_flatten: Annotated[bool, Knob(True, "a tensor as one vector")],
    nuslerp_row_wise: Annotated[
        bool, Knob(False, "without flatten: along the first axis, not the last")
    ],
    gram: Annotated[InnerProducts, Gram(over=_over)],
) -> Coefficients:
    """Spherical interpolation between two models, or their task vectors where there is a base.

    At t = w_2 / (w_1 + w_2) of the way (0.5 where the weights sum to nothing):
    sin((1-t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2, a being the angle between the two. Linear
    where sin(a) is under 1e-6: for parallel vectors, and for opposite ones, which no arc joins.
    """
    total = float(weight.sum())
    t = 0.5 if abs(total) < _LEAST_SUM else float(weight[1]) / total
    lengths = np.maximum(norms(gram), _LEAST_NORM)
    cosine = np.clip(gram[..., 0, 1] / (lengths[..., 0] * lengths[..., 1]), -1, 1)
    parallel = 1 - np.square(cosine) <= _LEAST_SINE**2
    return Coefficients(between(cosine, t, linear=parallel))
