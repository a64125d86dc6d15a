"""The memory budget, and the working buffers that worker threads reuse."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from streammerge import system
from streammerge.errors import BudgetError
from streammerge.sizes import format_size, parse_size

MIB = 1 << 20
LEAST_DEFAULT = 256 * MIB
# State of one tensor's statistics, where they can use so much; less of it may cost another read.
STATES = tuple(size * MIB for size in (96, 48, 24, 12, 4, 1))
# Processes start with a MiB more or less; the least budget that is named must do for the next one.
_START_SPREAD = 4 * MIB


def chosen_budget(memory: str | int | None) -> int:
    """Bytes that the user allows, as a number or as text such as `2GiB`, else the default."""
    budget = parse_size(memory, "--memory") if isinstance(memory, str) else memory
    return budget or default_budget()


def default_budget(environ: Mapping[str, str] = os.environ) -> int:
    """Bytes: half of the least of free memory, what the cgroup leaves, and the job's grant.

    At least 256 MiB; a merge that needs more than there is gets refused by the plan.
    """
    limits = [
        system.memory_available(),
        system.cgroup_memory_left(),
        system.scheduler_memory(environ, system.usable_cpus()),
    ]
    return max(LEAST_DEFAULT, min(limit for limit in limits if limit is not None) // 2)


def over_budget(
    what: str, needed_bytes: int, budget_bytes: int, otherwise: str = ""
) -> BudgetError:
    """The error for what does not fit the budget; it names the least that would do."""
    least = -(-(needed_bytes + _START_SPREAD) // MIB) * MIB
    return BudgetError(
        f"{what} does not fit the memory budget",
        least_bytes=least,
        found=f"a budget of {format_size(budget_bytes)}",
        remedy=f"--memory {least // MIB}MiB is the least that would do{otherwise}",
    )


class Scratch:
    """One thread's working buffers, by name, grown when needed and reused from tile to tile.

    An array that it hands out is overwritten by the next request for the same name: copy what
    you keep.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised C-contiguous array."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._buffers.pop(name, None)  # free the old one before the new one is made
            buffer = self._buffers[name] = self._new(nbytes)
        return buffer[:nbytes].view(kind).reshape(shape)

    def _new(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def rows(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An uninitialised buffer of float32 where the arithmetic is done."""
        return self.array(name, shape, np.float32)

    def fresh(self) -> Scratch:
        """Another one of the same kind, without buffers."""
        return Scratch()

    def settle(self) -> None:
        """Wait until what was computed is there for other threads."""

    def active(self) -> AbstractContextManager[Any]:
        """While a thread works with it."""
        return nullcontext()

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())
