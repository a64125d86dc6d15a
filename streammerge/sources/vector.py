"""A short stored tensor that is read once and held: the lengths of DoRA, AdaLoRA's values."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from streammerge.kernels.casts import widen
from streammerge.scratch import Scratch
from streammerge.storage.bytesource import Files
from streammerge.words import Extent, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_vector(files: Files, extent: Extent) -> NDArray[np.float32]:
    """All elements of a stored tensor in a row, as float32."""
    spec = extent.spec
    out = np.empty(spec.numel, np.float32)
    with files.tile(extent, Tile(0, spec.rows), Scratch()) as stored:
        widen(stored, spec.dtype, out)
    return out


class HeldVector:
    """Read at the first use, held until `release`."""

    def __init__(self, files: Files, extent: Extent) -> None:
        self._files = files
        self._extent = extent
        self._lock = threading.Lock()
        self._values: NDArray[np.float32] | None = None

    @property
    def resident_bytes(self) -> int:
        """With the stored bytes, while they are read."""
        return 4 * self._extent.spec.numel + self._extent.spec.nbytes

    @property
    def once_bytes(self) -> int:
        return self._extent.spec.nbytes

    def values(self) -> NDArray[np.float32]:
        with self._lock:
            if self._values is None:
                self._values = read_vector(self._files, self._extent)
            return self._values

    def release(self) -> None:
        with self._lock:
            self._values = None
