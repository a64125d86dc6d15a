"""A model's tensor of which an adapter holds some rows itself: trained tokens of an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.arrays import Rows
from streammerge.kernels.casts import widen
from streammerge.kernels.weighted import copy, subtract
from streammerge.scratch import Scratch
from streammerge.storage.bytesource import Files
from streammerge.words import Extent, OwnStatistic, Source, TensorSpec, Terms, Tile


class Replaced:
    """Another source's rows, but for those at `indices`, which are the rows of a stored tensor.

    `replacement` is `[len(indices), cols]`, in the order of the indices, none of them given twice.
    Where `rows` is the merge's own base, the difference of the other rows is exactly zero.
    """

    needs_base = True

    def __init__(
        self,
        files: Files,
        rows: Source,
        replacement: Extent,
        indices: Sequence[int],
        *,
        on_base: bool,
    ) -> None:
        self._files = files
        self._rows = rows
        self._replacement = replacement
        self._on_base = on_base
        self._order = np.argsort(np.asarray(indices, np.int64), kind="stable")
        self._indices: NDArray[np.int64] = np.asarray(indices, np.int64)[self._order]

    @property
    def spec(self) -> TensorSpec:
        return self._rows.spec

    @property
    def own_statistics(self) -> tuple[OwnStatistic, ...]:
        return self._rows.own_statistics

    @property
    def resident_bytes(self) -> int:
        return self._rows.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._rows.once_bytes

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        self._rows.read(tile, out, scratch)
        self._replace(tile, out, scratch)

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        if base_rows is None:
            raise ValueError("what replaces rows of the base is compared with them")
        if self._on_base:
            copy(base_rows, out)
            self._replace(tile, out, scratch)
        else:
            self.read(tile, out, scratch)
        subtract(out, base_rows, out)

    def _replace(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        spec = self._replacement.spec
        stored = scratch.array("replacing", (spec.cols * spec.dtype.itemsize,), np.uint8)
        row = scratch.rows("replacing row", (1, spec.cols))
        for place, index in self._inside(tile):
            self._files.block(self._replacement, range(index, index + 1), range(spec.cols), stored)
            widen(stored, spec.dtype, row)
            out[place] = row[0, :: tile.col_step]

    def _inside(self, tile: Tile) -> list[tuple[int, int]]:
        """A row of the tile that is replaced, and which of the stored rows does so; for each."""
        start, stop = np.searchsorted(self._indices, (tile.start, tile.stop))
        places, skipped = np.divmod(self._indices[start:stop] - tile.start, tile.row_step)
        hit = skipped == 0
        return list(zip(places[hit].tolist(), self._order[start:stop][hit].tolist(), strict=True))

    def terms(self) -> Terms:
        return Terms(self)

    def read_bytes(self, tile: Tile) -> int:
        spec = self._replacement.spec
        rows = 0 if self._on_base else self._rows.read_bytes(tile)
        return rows + len(self._inside(tile)) * spec.cols * spec.dtype.itemsize

    def scratch_bytes(self, tile: Tile) -> int:
        spec = self._replacement.spec
        return self._rows.scratch_bytes(tile) + spec.cols * (spec.dtype.itemsize + 4)

    def release(self) -> None:
        self._rows.release()
