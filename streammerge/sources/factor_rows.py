"""Output tensors that come of a pair of factors: the base with their product, or each factor."""

from __future__ import annotations

import numpy as np

from streammerge.arrays import PerModel, Rows
from streammerge.kernels.product import multiply
from streammerge.kernels.weighted import sum_of_squares
from streammerge.scratch import Scratch
from streammerge.sources.pairs import Pair
from streammerge.words import Source, TensorSpec, Tile


class Added:
    """`base + left @ right`; see `Maker`."""

    def __init__(self, base: Source, pair: Pair) -> None:
        self._base = base
        self._pair = pair

    @property
    def spec(self) -> TensorSpec:
        return self._base.spec

    @property
    def resident_bytes(self) -> int:
        return self._pair.resident_bytes + self._base.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._pair.once_bytes + self._base.once_bytes

    def rows(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        left, norms = self._pair.left(tile, scratch)
        merged = scratch.rows("merged", tile.shape(self.spec))
        multiply(left, self._pair.right(), merged)
        base = scratch.rows("base", merged.shape)
        self._base.read(tile, base, scratch)
        squared = sum_of_squares(base)
        np.add(base, merged, out=merged)
        return merged, np.array([squared, *norms])

    def read_bytes(self, tile: Tile) -> int:
        return self._base.read_bytes(tile) + self._pair.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self.spec)
        own = 2 * 4 * rows * cols
        return own + self._pair.scratch_bytes(tile) + self._base.scratch_bytes(tile)

    def release(self) -> None:
        self._pair.release()
        self._base.release()


class Left:
    """The left factor by itself; see `Maker`."""

    def __init__(self, spec: TensorSpec, pair: Pair) -> None:
        self.spec = spec
        self._pair = pair

    @property
    def resident_bytes(self) -> int:
        return self._pair.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._pair.once_bytes

    def rows(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        left, norms = self._pair.left(tile, scratch)
        return left, np.array([np.nan, *norms])  # of the base nothing is read

    def read_bytes(self, tile: Tile) -> int:
        return self._pair.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        return self._pair.scratch_bytes(tile)

    def release(self) -> None:
        """The other factor may still want the pair; it goes with the last of the two jobs."""


class Right:
    """The right factor by itself; see `Maker`."""

    def __init__(self, spec: TensorSpec, pair: Pair) -> None:
        self.spec = spec
        self._pair = pair

    @property
    def resident_bytes(self) -> int:
        return self._pair.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._pair.once_bytes

    def rows(self, tile: Tile, scratch: Scratch) -> tuple[Rows, PerModel]:
        return self._pair.right()[tile.start : tile.stop], np.array([np.nan])

    def read_bytes(self, tile: Tile) -> int:
        return 0

    def scratch_bytes(self, tile: Tile) -> int:
        return self._pair.finding_bytes

    def release(self) -> None:
        """The other factor may still want the pair; it goes with the last of the two jobs."""
