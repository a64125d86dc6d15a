"""Where the model is near the base, take the model."""

from __future__ import annotations

from typing import Annotated

from streammerge.arrays import Deltas, Rows
from streammerge.declarations import Knob
from streammerge.kernels.weighted import take_up_to
from streammerge.methods.registry import method

_LEAST = 1e-6


@method(
    models=(1, 1),
    reference="huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    temporaries=1,
)
def nearswap(
    deltas: Deltas,  # [1, rows, cols]
    *,
    t: Annotated[float, Knob(None, "differences up to this are taken in full")],
) -> Rows:
    """The base plus min(1, t / |d|) times each difference d of the model from it.

    A difference of magnitude up to t is taken in full, a larger one as t in its direction. |d|
    counts as 1e-6 at least; with t below zero, nothing is taken.
    """
    return take_up_to(deltas[0], t, _LEAST)
