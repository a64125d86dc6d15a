"""A model with an adapter applied: base rows plus what the adapter adds."""

from __future__ import annotations

import numpy as np

from streammerge.arrays import Rows
from streammerge.memory import Scratch
from streammerge.sources.low_rank import Product
from streammerge.storage.bytesource import Files
from streammerge.words import Adapter, Source, TensorSpec, Terms, Tile


class Adapted:
    """`rows + update`, where the update is low-rank.

    Where `rows` is the merge's own base, the delta is the update itself: (base + delta) - base
    would lose what the base's magnitude rounds away.
    """

    def __init__(self, files: Files, rows: Source, adapter: Adapter, *, on_base: bool) -> None:
        self._rows = rows
        self._factors = adapter.factors()
        self._product = Product(files, self._factors)
        self.needs_base = not on_base

    @property
    def spec(self) -> TensorSpec:
        return self._rows.spec

    @property
    def resident_bytes(self) -> int:
        return self._product.resident_bytes + self._rows.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._product.right_bytes + self._rows.once_bytes

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        self._product.rows(tile, out, scratch)
        rows = scratch.array("adapted", out.shape, np.float32)
        self._rows.read(tile, rows, scratch)
        np.add(out, rows, out=out)

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        self._product.rows(tile, out, scratch)
        if self.needs_base:
            difference = scratch.array("adapted", out.shape, np.float32)
            self._rows.delta(tile, base_rows, difference, scratch)
            np.add(out, difference, out=out)

    def terms(self) -> Terms:
        below = self._rows.terms()
        return Terms(below.rows, below.factors + self._factors)

    def read_bytes(self, tile: Tile) -> int:
        rows = self._rows.read_bytes(tile) if self.needs_base else 0
        return self._product.read_bytes(tile) + rows

    def scratch_bytes(self, tile: Tile) -> int:
        rows, cols = tile.shape(self.spec)
        adapted = self._rows.scratch_bytes(tile) + 4 * rows * cols
        return self._product.scratch_bytes(tile) + adapted

    def release(self) -> None:
        self._product.release()
        self._rows.release()
