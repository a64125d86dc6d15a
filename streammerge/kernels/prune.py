"""Magnitude pruning: count against a bracket, and keep the largest.

A magnitude is compared by the bits of its absolute value, an unsigned integer that orders
non-negative floats: its key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.faces import two_faced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streammerge.arrays import Deltas, Rows
    from streammerge.scratch import Scratch

ABOVE_ALL = 0x80000000  # greater than the key of any float, NaN included
KEEP_ALL_EQUAL = 1 << 62


@dataclass(frozen=True, slots=True)
class Cut:
    """What to keep of one tile, per model: keys above the threshold, and `quota` equal ones."""

    thresholds: tuple[int, ...]  # [models], a key; 0 keeps everything
    quotas: tuple[int, ...]  # [models], equal magnitudes to keep in this tile, lowest index first


@two_faced()
def keys(rows: Rows, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
    """The keys of all elements, same shape."""
    found: NDArray[np.uint32] = np.bitwise_and(rows.view(np.uint32), ABOVE_ALL - 1, out=out)
    return found


@two_faced()
def count_and_collect(
    rows: Rows, low: int, high: int, scratch: Scratch
) -> tuple[int, NDArray[np.uint32]]:
    """How many keys are at or above `high`, and those in `[low, high)` in a reused buffer."""
    from streammerge.kernels import cpu

    found = scratch.array("found", (rows.size,), np.uint32)
    flat = rows.reshape(-1)
    above, inside = cpu.count_and_collect(flat, np.uint32(low), np.uint32(high), found)
    return int(above), found[:inside]


@two_faced()
def count_nonzero(rows: Rows) -> int:
    """How many elements are not zero."""
    return int(np.count_nonzero(rows))


def count_below(found: NDArray[np.uint32], key: int) -> int:
    """How many of some keys `[n]` are under a key."""
    from streammerge.kernels import cpu

    return int(cpu.count_below(found, np.uint32(key)))


@two_faced()
def trim(deltas: Deltas, cut: Cut) -> Deltas:
    """Keep each model's largest magnitudes `[models, rows, cols]`, in place; returns `deltas`."""
    from streammerge.kernels import cpu

    for delta, threshold, quota in zip(deltas, cut.thresholds, cut.quotas, strict=True):
        flat = delta.reshape(-1)
        if threshold == 0:
            continue
        if 0 < quota < KEEP_ALL_EQUAL:
            cpu.keep_largest(flat, np.uint32(threshold), quota)
        else:
            cpu.keep_at_least(flat, np.uint32(threshold + (quota == 0)))
    return deltas


@two_faced()
def drop_largest(deltas: Deltas, cut: Cut) -> Deltas:
    """Zero what `trim` would keep, in place; returns `deltas`."""
    from streammerge.kernels import cpu

    for delta, threshold, quota in zip(deltas, cut.thresholds, cut.quotas, strict=True):
        if threshold < ABOVE_ALL:
            cpu.drop_largest(delta.reshape(-1), np.uint32(threshold), quota)
    return deltas


def magnitude_of(key: int) -> float:
    """The magnitude that a key stands for."""
    return float(np.array([key], np.uint32).view(np.float32)[0])
