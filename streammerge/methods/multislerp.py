"""The mean direction of any number of models."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import InnerProducts, PerModel, Vectors
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method
from streammerge.methods.spherical import norms
from streammerge.statistics import Gram

_LEAST_MEAN = 1e-6  # under it, the inner products of unit vectors tell no direction


@method(reference="goddard.blog/posts/multislerp-wow-what-a-cool-idea")
def multislerp(
    models: Vectors,
    *,
    weight: Annotated[PerModel, Knob(1.0, "pull of this model")],
    normalize_weights: Annotated[bool, Knob(True, "divide the weights by their sum")],
    eps: Annotated[float, Knob(1e-8, "added to every length before dividing by it", above=0)],
    gram: Annotated[InnerProducts, Gram()],
) -> Coefficients:
    """The weighted mean direction of the models, at their weighted mean length.

    With a base, of the task vectors, and added to it. The method is put as a step from the mean
    direction in the tangent space there, but the weighted tangents sum to nothing at the mean, so
    the mean is the result. Directions that cancel have no mean: then the models are summed.
    """
    if len(weight) == 1:
        return Coefficients([1.0])
    share = weight / weight.sum() if normalize_weights else weight
    lengths = norms(gram)
    of_mean = share / (lengths + eps)
    length = float(np.sqrt(max(0.0, of_mean @ gram @ of_mean)))
    if length < max(eps, _LEAST_MEAN):
        return Coefficients(share.tolist())
    return Coefficients((of_mean * (share @ lengths) / length).tolist())
