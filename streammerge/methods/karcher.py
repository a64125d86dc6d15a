"""The mean of the models on the sphere."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import InnerProducts, PerModel, Weights
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method
from streammerge.methods.spherical import norms
from streammerge.statistics import Gram


@method(reference="Karcher, Riemannian center of mass, 1977; arXiv 2603.04972")
def karcher(
    models: Weights,
    *,
    max_iter: Annotated[int, Knob(10, "the most steps", at_least=1, up_to=10000)],
    tol: Annotated[float, Knob(1e-5, "lengths and angles under this are nothing", above=0)],
    gram: Annotated[InnerProducts, Gram()],
) -> Coefficients:
    """The direction that lies nearest to those of all models, at their mean length.

    Every model listed counts equally. The squared angles to them are brought to their least by
    steps along the sphere, from the mean of the directions (from the first where they cancel).
    An iterate is a combination of the models, so the steps are taken on their inner products
    alone. A model opposite to an iterate pulls it nowhere.
    """
    lengths = norms(gram)
    if len(lengths) == 1:
        return Coefficients([1.0])
    valid = np.flatnonzero(lengths > tol)
    factors = np.zeros(len(lengths))
    if len(valid):
        cosines = gram[np.ix_(valid, valid)] / np.outer(lengths[valid], lengths[valid])
        factors[valid] = _mean(cosines, max_iter, tol) * lengths.mean() / lengths[valid]
    return Coefficients(factors.tolist())


def _mean(cosines: InnerProducts, max_iter: int, tol: float) -> PerModel:
    """The mean direction as a combination of unit vectors with these cosines, `[n, n] -> [n]`."""

    def length(combination: PerModel) -> float:
        return float(np.sqrt(max(0.0, float(combination @ cosines @ combination))))

    share = 1 / len(cosines)
    mean: PerModel = np.full(len(cosines), share)
    start = length(mean)
    mean = np.eye(len(cosines), dtype=np.float64)[0] if start < tol else mean / start
    for _ in range(max_iter):
        cosine = np.clip(cosines @ mean, -1, 1)
        angle = np.arccos(cosine)
        pulls = (angle >= tol) & (np.pi - angle >= tol)
        pull = np.where(pulls, share * angle / np.sin(np.where(pulls, angle, 1.0)), 0.0)
        tangent = pull - (pull @ cosine) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean = mean / length(mean)
    return mean
