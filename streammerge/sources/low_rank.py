"""Low-rank updates, evaluated band by band: one product for any number of stacked factors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from streammerge.arrays import PerModel, Rows
from streammerge.kernels.casts import widen
from streammerge.kernels.faces import to_host
from streammerge.kernels.product import gram, multiply, squared_norms, thinned
from streammerge.kernels.weighted import copy, multiply_by
from streammerge.scratch import Scratch
from streammerge.sources.vector import read_vector
from streammerge.storage.bytesource import Files
from streammerge.words import Factors, Matrix, OwnStatistic, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A factor is loaded by blocks of this size, so that a large rank takes no more room.
_LOADED_ELEMENTS = 1 << 16
# Of a left factor no larger than this, to read a tile's rows costs a third of multiplying them.
_HELD_BYTES = 1 << 20


class Product:
    """`sum of weight_i * scale_i * left_i @ right_i` as one product over the stacked factors.

    A right factor's rows are multiplied by its `values`, where it has some, as it is read.

    The scale and the weight enter the left factor, `float32(weight_i * scale_i) * left_i`; that is
    the documented formula, and it costs `rows * rank` products instead of `rows * cols`.

    The right factors `[sum of ranks, cols]` are held from the first use until `release`, and so are
    small left ones; of large ones only the rows of the tile are read.
    """

    needs_rows = False
    own_statistics: tuple[OwnStatistic, ...] = ()

    def __init__(
        self, files: Files, factors: Sequence[Factors], weights: Sequence[float] | None = None
    ) -> None:
        self._files = files
        self.factors = tuple(factors)
        self._column_factors = self._factors_of(weights or (1.0,) * len(self.factors))
        self.rank = sum(pair.rank for pair in self.factors)
        self._cols = self.factors[0].right.cols
        largest = max(pair.left.rows * pair.rank for pair in self.factors)
        self._holds_left = 4 * largest <= _HELD_BYTES
        self._lock = threading.Lock()
        self._held_left: Rows | None = None
        self._right: Rows | None = None
        self._grams: list[NDArray[np.float64]] = []
        self._right_gram: NDArray[np.float64] | None = None

    @property
    def resident_bytes(self) -> int:
        left = self.factors[0].left.rows if self._holds_left else 0
        return 4 * self.rank * (self._cols + left)

    def read_bytes(self, tile: Tile) -> int:
        """Of the left factors; what is held is counted by `once_bytes`, once per tensor."""
        if self._holds_left:
            return 0
        return sum(
            pair.rank * _itemsize(pair.left) * self._rows_read(pair.left, tile)
            for pair in self.factors
        )

    def _rows_read(self, left: Matrix, tile: Tile) -> int:
        """Rows lie together; columns with gaps between them are read with the gaps."""
        thinned = left.transposed and tile.row_step > 1
        return left.rows if thinned else len(range(tile.start, tile.stop, tile.row_step))

    @property
    def once_bytes(self) -> int:
        """Of the right factors, and of the left ones that are held."""
        values = sum(pair.values.spec.nbytes for pair in self.factors if pair.values is not None)
        left = sum(_stored_bytes(pair.left) for pair in self.factors) if self._holds_left else 0
        return values + left + sum(_stored_bytes(pair.right) for pair in self.factors)

    def scratch_bytes(self, tile: Tile) -> int:
        """Of a thread; that which loads what is held has a block of one factor besides."""
        rows = len(range(tile.start, tile.stop, tile.row_step))
        loaded = [pair.right for pair in self.factors]
        loaded += [pair.left for pair in self.factors] if self._holds_left else []
        loading = max(_loading_bytes(matrix) for matrix in loaded)
        widest = max(pair.rank * (_itemsize(pair.left) + 4) for pair in self.factors)
        thinned = 4 * self.rank * self._cols // tile.col_step if tile.col_step > 1 else 0
        band = rows * (8 * self.rank + widest) + thinned + self._whole_row_bytes(tile)
        return band + loading

    def _whole_row_bytes(self, tile: Tile) -> int:
        """The columns of a sample are cut from stored rows, one after the other."""
        if tile.row_step == 1:
            return 0
        lefts = [pair.left for pair in self.factors if pair.left.transposed]
        return max((left.rows * _itemsize(left) for left in lefts), default=0)

    def rows(self, tile: Tile, own: Rows | None, out: Rows, scratch: Scratch) -> None:
        """The summed update of a tile, `[rows, cols]`, whatever rows it is added to."""
        left = self.left(tile, scratch)
        self._multiply(tile, left, out, scratch)

    def rows_and_norms(
        self, tile: Tile, out: Rows, scratch: Scratch, weights: Sequence[float] | None = None
    ) -> PerModel:
        """As `rows`; returns the squared norm of each `scale_i * left_i @ right_i`, unweighted.

        `weights` stand in for those that the product was made with.
        """
        left = self.left(tile, scratch)
        norms = self.norms(left, scratch)
        self._multiply(tile, left, out, scratch, weights)
        return norms

    def norms(self, left: Rows, scratch: Scratch) -> PerModel:
        """Squared norms of each `scale_i * left_i @ right_i` over rows of the left factors."""
        if not self._grams:
            self._grams = self._right_grams(self.right(scratch))
        return squared_norms(left, self._grams, [pair.scale for pair in self.factors])

    def gram(self, tile: Tile, scratch: Scratch) -> NDArray[np.float64]:
        """`[factors, factors]`: inner products of the `scale_i * left_i @ right_i` over the tile.

        In float64: `<l_i r_i, l_j r_j>` is the sum of `(l_i.T l_j) * (r_i r_j.T)`, so no product
        of the tile's size is formed.
        """
        right = self.right(scratch)
        left = self.left(tile, scratch)
        with self._lock:
            if self._right_gram is None:
                self._right_gram = gram(right)
        wide: NDArray[np.float64] = scratch.array("left of gram", left.shape, np.float64)
        wide[...] = to_host(left)
        small: NDArray[np.float64] = scratch.array("gram", (self.rank,) * 2, np.float64)
        np.matmul(wide.T, wide, out=small)
        small *= self._right_gram
        starts = np.cumsum([0, *(pair.rank for pair in self.factors[:-1])])
        blocks = np.add.reduceat(np.add.reduceat(small, starts, axis=0), starts, axis=1)
        scales = np.array([pair.scale for pair in self.factors])
        return np.asarray(blocks * np.outer(scales, scales), np.float64)

    @property
    def gram_resident_bytes(self) -> int:
        """What `gram` holds besides, until `release`."""
        return 8 * self.rank**2

    def gram_scratch_bytes(self, tile: Tile) -> int:
        """What one `gram` of the tile takes from the scratch and besides."""
        rows = len(range(tile.start, tile.stop, tile.row_step))
        sums = 8 * self.rank * (2 * self.rank + len(self.factors))
        return self.scratch_bytes(tile) + 8 * rows * self.rank + sums

    def release(self) -> None:
        with self._lock:
            self._held_left = None
            self._right = None
            self._grams = []
            self._right_gram = None

    def _multiply(
        self,
        tile: Tile,
        left: Rows,
        out: Rows,
        scratch: Scratch,
        weights: Sequence[float] | None = None,
    ) -> None:
        right = self.right(scratch)
        if tile.col_step > 1:
            right = thinned(right, tile.col_step)
        multiply(self.scaled(left, scratch, weights), right, out)

    def scaled(self, left: Rows, scratch: Scratch, weights: Sequence[float] | None = None) -> Rows:
        """A copy of rows of the left factors, each times its scale and weight."""
        factors = self._column_factors if weights is None else self._factors_of(weights)
        out = scratch.rows("scaled left", left.shape)
        copy(left, out)
        multiply_by(out, factors)
        return out

    def _factors_of(self, weights: Sequence[float]) -> NDArray[np.float64]:
        """`[1, sum of ranks]`: of each column of the left factors, the scale and the weight."""
        factors = [w * pair.scale for w, pair in zip(weights, self.factors, strict=True)]
        return np.repeat(factors, [pair.rank for pair in self.factors])[np.newaxis]

    def left(self, tile: Tile, scratch: Scratch) -> Rows:
        """The tile's rows of the left factors side by side, unscaled: `[rows, sum of ranks]`.

        Not to be written to.
        """
        rows = range(tile.start, tile.stop, tile.row_step)
        if self._holds_left:
            return self._held(scratch)[tile.start : tile.stop : tile.row_step]
        left = scratch.rows("left", (len(rows), self.rank))
        self._read_left(rows, left, scratch)
        return left

    def _held(self, scratch: Scratch) -> Rows:
        with self._lock:
            if self._held_left is None:
                own = scratch.fresh()
                rows = self.factors[0].left.rows
                left = own.rows("left", (rows, self.rank))
                for block in _blocks(self.factors[0].left):
                    self._read_left(block, left[block.start : block.stop], own)
                own.settle()
                self._held_left = left
            return self._held_left

    def _read_left(self, rows: range, out: Rows, scratch: Scratch) -> None:
        start = 0
        for pair in self.factors:
            self._read(pair.left, rows, out[:, start : start + pair.rank], scratch)
            start += pair.rank

    def right(self, scratch: Scratch) -> Rows:
        """The right factors under each other: `[sum of ranks, cols]`."""
        with self._lock:
            if self._right is None:
                own = scratch.fresh()  # not the worker's: this is used once per tensor
                right = own.rows("right", (self.rank, self._cols))
                start = 0
                for pair in self.factors:
                    block = right[start : start + pair.rank]
                    for rows in _blocks(pair.right):
                        self._read(pair.right, rows, block[rows.start : rows.stop], own)
                    if pair.values is not None:
                        values = read_vector(self._files, pair.values).astype(np.float64)
                        multiply_by(block, values[:, np.newaxis])
                    start += pair.rank
                own.settle()
                self._right = right
            return self._right

    def _right_grams(self, right: Rows) -> list[NDArray[np.float64]]:
        grams, start = [], 0
        for pair in self.factors:
            grams.append(gram(right[start : start + pair.rank]))
            start += pair.rank
        return grams

    def _read(self, matrix: Matrix, rows: range, out: Rows, scratch: Scratch) -> None:
        """Some rows of a factor, widened; `out` is `[len(rows), matrix.cols]`, any strides."""
        spec = matrix.extent.spec
        shape = (matrix.cols, len(rows)) if matrix.transposed else (len(rows), matrix.cols)
        size = len(rows) * matrix.cols
        stored = scratch.array("stored factor", (size * spec.dtype.itemsize,), np.uint8)
        if matrix.transposed:
            self._read_columns(matrix, rows, stored, scratch)
        else:
            self._files.block(matrix.extent, rows, range(matrix.cols), stored)
        wide = scratch.rows("factor", shape)
        widen(stored, spec.dtype, wide)
        out[...] = wide.T if matrix.transposed else wide

    def _read_columns(
        self, matrix: Matrix, rows: range, stored: NDArray[np.uint8], scratch: Scratch
    ) -> None:
        """Columns of the stored matrix, which are rows of its transpose."""
        stored_rows = range(matrix.cols)
        if rows.step == 1:
            self._files.block(matrix.extent, stored_rows, rows, stored)
            return
        size = matrix.extent.spec.dtype.itemsize
        whole = scratch.array("whole row of factor", (matrix.rows, size), np.uint8)
        target = stored.reshape(len(stored_rows), len(rows), size)
        for row in stored_rows:
            self._files.block(
                matrix.extent, range(row, row + 1), range(matrix.rows), whole.reshape(-1)
            )
            target[row] = whole[rows.start : rows.stop : rows.step]


def _blocks(matrix: Matrix) -> list[range]:
    """The rows that are loaded at once: few, or all where each would be a column of the file."""
    few = max(1, _LOADED_ELEMENTS // max(1, matrix.cols))
    step = matrix.rows if matrix.transposed else few
    return [range(row, min(row + step, matrix.rows)) for row in range(0, matrix.rows, step)]


def _loading_bytes(matrix: Matrix) -> int:
    """Of a block, as stored and in float32."""
    rows = max((len(block) for block in _blocks(matrix)), default=0)
    return rows * matrix.cols * (_itemsize(matrix) + 4)


def _elements(matrix: Matrix) -> int:
    return matrix.rows * matrix.cols


def _itemsize(matrix: Matrix) -> int:
    return matrix.extent.spec.dtype.itemsize


def _stored_bytes(matrix: Matrix) -> int:
    return _elements(matrix) * _itemsize(matrix)
