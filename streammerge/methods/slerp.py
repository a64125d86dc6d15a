"""Along the arc between the base and one model."""

from __future__ import annotations

from math import sqrt
from typing import Annotated

import numpy as np

from streammerge.arrays import Deltas, InnerProducts
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method
from streammerge.methods.spherical import between
from streammerge.statistics import Gram

_PARALLEL = 0.9995
_LEAST_NORM = 1e-8


@method(models=(1, 1), reference="Shoemake, Animating rotation with quaternion curves, 1985")
def slerp(
    deltas: Deltas,
    *,
    t: Annotated[float, Knob(None, "how far along: 0 is the base, 1 the model")],
    gram: Annotated[InnerProducts, Gram(with_base=True)],
) -> Coefficients:
    """Spherical interpolation from the base to the model, each tensor as one vector.

    The angle is that between the directions; what is interpolated are the vectors as they are:
    sin((1-t) a) / sin(a) base + sin(t a) / sin(a) model. Linear where |cos a| is above 0.9995. A
    vector shorter than 1e-8 counts as at right angles to everything.
    """
    base, across, delta = float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1])
    model = max(0.0, base + 2 * across + delta)  # the squared length of base + delta
    lengths = [sqrt(squared) for squared in (base, model)]
    first, second = (length if length > _LEAST_NORM else 1.0 for length in lengths)
    cosine = float(np.clip((base + across) / (first * second), -1, 1))
    of_base, of_model = between(cosine, t, linear=abs(cosine) > _PARALLEL)
    return Coefficients([of_model], base=of_base + of_model)
