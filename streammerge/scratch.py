"""The working buffers that worker threads reuse."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


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
