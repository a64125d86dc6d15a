"""Average what models share, keep what one has alone."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from streammerge.arrays import Deltas, Rows
from streammerge.declarations import Knob
from streammerge.kernels.contributions import merge_contributions
from streammerge.methods.registry import method

Epsilon = Annotated[float, Knob(1e-5, "a difference up to this is none", at_least=0)]


@method(reference="Reinforced Agent Merging, arXiv 2601.13572", temporaries=0)
def ram(deltas: Deltas, *, epsilon: Epsilon) -> Rows:
    """The base plus, per element, the mean of the differences that are more than epsilon.

    A difference that one model has alone is kept at its full strength.
    """
    return merge_contributions(deltas, epsilon, np.ones(len(deltas)))
