"""The sum of the updates, with all directions made equally strong."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import Core, Cores, PerModel
from streammerge.declarations import Knob
from streammerge.kernels.spectral import isotropic
from streammerge.methods.registry import method


@method(reference="Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959")
def iso_c(
    cores: Cores,  # [models, left basis, right basis]
    *,
    weight: Annotated[PerModel, Knob(1.0, "factor of this model's update")],
    lambda_: Annotated[float, Knob(1.0, "factor of the merged update")],
) -> Core:
    """Base plus lambda times the sum of w_i d_i, its singular values replaced by their mean.

    Directions that one task dominates no longer outweigh the others. The mean is over the non-zero
    singular values; null directions stay null. Needs low-rank updates.
    """
    return lambda_ * isotropic(np.tensordot(weight, cores, 1))
