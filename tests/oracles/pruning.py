"""What each way of pruning leaves of a float32 task vector, in float64; nothing of the package."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from tests.oracles.dense import Exact, Single

_BITS = (1 << 64) - 1


def number(seed: int, tensor: str, model: int, index: int) -> float:
    """The random number of one element, in plain Python: splitmix64 of a hash plus an index."""
    digest = hashlib.sha256(f"{seed} {model} {tensor}".encode()).digest()
    z = int.from_bytes(digest[:8], "little") + 0x9E3779B97F4A7C15 * (index + 1) & _BITS
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _BITS
    return ((z ^ z >> 31) >> 11) / 2**53


@lru_cache(maxsize=64)
def numbers(seed: int, tensor: str, model: int, size: int) -> Exact:
    """Of the first elements of a tensor."""
    return np.array([number(seed, tensor, model, index) for index in range(size)])


def dropped(delta: Single, density: float, drawn: Exact) -> Exact:
    """Each element with probability density, by its own number."""
    return np.where(drawn.reshape(delta.shape) < density, delta.astype(np.float64), 0)


def probabilities(delta: Single, density: float, epsilon: float) -> Exact:
    """By rank within a row, from density - epsilon to density + epsilon."""
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
    count = rows.shape[1]
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    if count == 1:
        return np.full(delta.shape, density)
    share: Exact = (density - epsilon) + ranks / (count - 1) * 2 * epsilon
    return share.reshape(delta.shape)


def dropped_by_rank(
    delta: Single, density: float, epsilon: float, drawn: Exact, *, divide: bool
) -> Exact:
    if density >= 1:
        return delta.astype(np.float64)
    share = probabilities(delta, density, epsilon)
    kept = np.where(drawn.reshape(delta.shape) < share, delta.astype(np.float64), 0)
    return kept / share if divide else kept


def middle(delta: Single, density: float, gamma: float) -> Exact:
    """Sorted by magnitude, a slice of the wanted length from where the smallest end."""
    flat = delta.reshape(-1).astype(np.float64)
    if density >= 1:
        return flat.reshape(delta.shape)
    wanted = max(1, int(density * flat.size))
    small = max(0, flat.size - wanted - int(gamma * flat.size))
    order = np.argsort(-np.abs(flat), kind="stable")[::-1]  # the smallest first
    kept = np.zeros(flat.size)
    kept[order[small : small + wanted]] = flat[order[small : small + wanted]]
    return kept.reshape(delta.shape)


def to_old_norm(before: Single, after: Exact) -> Exact:
    """Scaled to the L1 norm that it had."""
    old, new = float(np.abs(before.astype(np.float64)).sum()), float(np.abs(after).sum())
    return after if old < 1e-7 or new < 1e-7 else after * (old / new)
