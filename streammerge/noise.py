"""Random numbers that belong to elements: a function of seed, tensor, model and index alone.

Not of tile, thread, order or device, so a merge drops the same elements however it is run. The
number of an element is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) of a key plus the golden ratio times its index; the key is a strong hash,
since streams of keys that lie near each other are correlated.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BITS = 53  # of a number in [0, 1), as many as a float64 holds


def key_of(seed: int, tensor: str, model: int) -> int:
    """The key of a model's tensor, 64 bits; `model` is its position in the recipe."""
    digest = hashlib.sha256(f"{seed} {model} {tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniform(key: int, first: int, count: int) -> NDArray[np.float64]:
    """The numbers in [0, 1) of `count` elements from flat index `first`; what kernels must give."""
    index = np.arange(first, first + count, dtype=np.uint64)
    z = np.uint64(key) + np.uint64(GOLDEN) * (index + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    z = z ^ (z >> np.uint64(31))
    return np.asarray((z >> np.uint64(64 - BITS)) * 2.0**-BITS, np.float64)


def limit_of(share: float) -> int:
    """A number of BITS bits is under this where the number in [0, 1) is under the share."""
    return math.ceil(math.ldexp(share, BITS))


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one tile: a key for each model in the stack, the first flat index."""

    keys: tuple[int, ...]
    first: int
