"""Dropping elements by chance, each by its own random number (see `noise`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.faces import two_faced
from streammerge.noise import limit_of

if TYPE_CHECKING:
    from streammerge.arrays import Deltas, PerModel
    from streammerge.noise import Draws


@two_faced()
def drop(deltas: Deltas, share: PerModel, random: Draws) -> Deltas:
    """Keep each element with the probability `share` of its model, in place; returns `deltas`.

    `deltas` is `[models, rows, cols]`, `share` `[models]`.
    """
    from streammerge.kernels import cpu

    first = np.uint64(random.first)
    for delta, kept, key in zip(deltas, share.tolist(), random.keys, strict=True):
        if kept < 1:
            cpu.drop(delta.reshape(-1), np.uint64(key), first, np.uint64(limit_of(kept)))
    return deltas


@two_faced()
def drop_by_rank(
    deltas: Deltas, share: PerModel, spread: PerModel, random: Draws, *, divide: bool
) -> Deltas:
    """Keep large elements more often than small ones, in place; returns `deltas`.

    Within a row of n elements, that of rank r (0 the smallest magnitude; of equal ones the first
    column) stays with probability `share - spread + 2 spread r / (n - 1)`, alone in its row with
    `share`. `divide`: what stays is divided by its probability. A model of share 1 stays as it is.
    Allocates eight bytes for each element of a row, and 18 KiB.
    """
    from streammerge.kernels import cpu

    settings = zip(share.tolist(), spread.tolist(), random.keys, strict=True)
    ranks, columns = np.empty((2, deltas.shape[-1]), np.uint32)
    counts = np.empty(2 * cpu.DIGIT + cpu.LAST_DIGIT, np.uint32)
    for delta, (kept, around, key) in zip(deltas, settings, strict=True):
        if kept < 1:
            ends = kept - around, kept + around
            numbers = np.uint64(key), np.uint64(random.first)
            cpu.drop_by_rank(delta, *numbers, *ends, divide, ranks, columns, counts)
    return deltas
