"""Task singular vectors, made orthogonal between tasks."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import Core, Cores, PerModel
from streammerge.declarations import Knob
from streammerge.kernels.spectral import polar, svd
from streammerge.methods.registry import method


@method(reference="Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081")
def tsv(
    cores: Cores,  # [models, left basis, right basis]
    *,
    weight: Annotated[PerModel, Knob(1.0, "factor of this model's update")],
    lambda_: Annotated[float, Knob(1.0, "factor of the merged update")],
) -> Core:
    """Each update's strongest singular directions, made orthogonal to those of the others.

    Of each of the T updates the max(1, int(rank / T)) largest singular values stay. All left
    vectors side by side, and all right ones, give way to the nearest orthonormal ones (the polar
    factor); the singular values stay, times w_i. Needs low-rank updates.
    """
    left, values, right = [], [], []
    for core, factor in zip(cores, weight, strict=True):
        u, strengths, vt = svd(core)
        count = max(1, len(strengths) // len(cores))
        left.append(u[:, :count])
        values.append(factor * strengths[:count])
        right.append(vt[:count])
    across, along = polar(np.hstack(left)), polar(np.vstack(right).T)
    return np.asarray(lambda_ * (across * np.concatenate(values)) @ along.T)
