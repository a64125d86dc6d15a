"""What the methods on a sphere share."""

from __future__ import annotations

import numpy as np

from streammerge.arrays import Factor, InnerProducts


def norms(gram: InnerProducts) -> InnerProducts:
    """`[..., n, n]` to the lengths `[..., n]`; a rounding below zero is zero."""
    return np.asarray(np.sqrt(np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0.0)))


def between(cosine: Factor, t: float, *, linear: Factor) -> tuple[Factor, Factor]:
    """The factors of two vectors at `t` of the way along the arc between their directions.

    `sin((1-t) a) / sin a` and `sin(t a) / sin a`, where `cos a` is the cosine; `1 - t` and `t` in
    the places that `linear` says.
    """
    angle = np.arccos(np.where(linear, 0.0, cosine))
    first = np.where(linear, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    second = np.where(linear, t, np.sin(t * angle) / np.sin(angle))
    return first, second
