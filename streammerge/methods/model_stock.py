"""The mean of fine-tuned models, drawn towards the base as far as they disagree."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated

import numpy as np

from streammerge.arrays import Deltas, InnerProducts
from streammerge.declarations import Coefficients, Knob
from streammerge.methods.registry import method
from streammerge.methods.spherical import norms
from streammerge.statistics import Gram
from streammerge.statistics.gram import Over

_LEAST = 1e-6


def _over(filter_wise: bool) -> Over:
    return "each row" if filter_wise else "tensor"


@method(models=(2, None), reference="Jang et al., Model Stock, ECCV 2024, arXiv 2403.19522")
def model_stock(
    deltas: Deltas,
    *,
    filter_wise: Annotated[bool, Knob(False, "one angle for each row, not for the tensor")],
    gram: Annotated[InnerProducts, Gram(over=_over)],
) -> Coefficients:
    """t times the mean of the models and 1 - t times the base, t = N c / (1 + (N - 1) c).

    c is the mean cosine between the task vectors of all pairs of the N models, the product of two
    lengths being at least 1e-6. An adapter that leaves a tensor alone has a cosine of zero to
    all others. The base where the divisor is under 1e-6.
    """
    models = gram.shape[-1]
    lengths = norms(gram)
    cosines = [
        np.clip(gram[..., i, j] / np.maximum(lengths[..., i] * lengths[..., j], _LEAST), -1, 1)
        for i, j in combinations(range(models), 2)
    ]
    cosine = np.mean(cosines, axis=0)
    divisor = 1 + (models - 1) * cosine
    singular = np.abs(divisor) < _LEAST
    share = np.where(singular, 0.0, cosine / np.where(singular, 1.0, divisor))
    return Coefficients([share] * models)
