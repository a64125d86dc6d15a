"""DoRA: the rows with a product added, every output feature brought to a length of its own.

    W' = f (W + s B A),  f = m / norm(W + s B A)

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv 2402.09353). The norm is
that of an output feature over all of its inputs: of a row, or of a column where the base stores
the weight as `[in, out]` and for embeddings. There is no epsilon. A feature that is all zeros has
no direction that a length could be given to; PEFT divides by zero there, here it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from streammerge import grid
from streammerge.arrays import Rows
from streammerge.kernels.norms import norms_of_rows, rescale_columns, rescale_rows
from streammerge.scratch import Scratch
from streammerge.sources.adapted import Adapted
from streammerge.sources.low_rank import Product
from streammerge.sources.vector import HeldVector
from streammerge.statistics import ColumnNorms, ColumnSquares
from streammerge.storage.bytesource import Files
from streammerge.words import Dora, Factors, OwnStatistic, Source, StatisticValue, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Exact = NDArray[np.float64]


# A feature's norm and factor, and what is in between.
_FEATURE_BYTES = 4 * 8


class DoraOfRows:
    """A change by which each row gets its length; see `adapted.Change`.

    A tile has whole rows, so it knows their norms. Of a sample that leaves columns out, the whole
    rows are read, a few at a time.
    """

    needs_rows = True
    own_statistics: tuple[OwnStatistic, ...] = ()
    factors: tuple[Factors, ...] = ()

    def __init__(self, files: Files, rows: Source, update: Dora) -> None:
        self._own = rows
        self._product = Product(files, [update.factors])
        self._lengths = HeldVector(files, update.magnitude)

    @property
    def resident_bytes(self) -> int:
        return self._product.resident_bytes + self._lengths.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._product.once_bytes + self._lengths.once_bytes

    def rows(self, tile: Tile, own: Rows | None, out: Rows, scratch: Scratch) -> None:
        assert own is not None, "it depends on the rows that it changes"
        norms = self._norms_of_whole_rows(tile, scratch) if tile.col_step > 1 else None
        self._product.rows(tile, own, out, scratch)
        if norms is None:
            norms = norms_of_rows(own, out)
        lengths = self._lengths.values()[tile.start : tile.stop : tile.row_step]
        rescale_rows(own, out, _factors(lengths, norms))

    def _norms_of_whole_rows(self, tile: Tile, scratch: Scratch) -> Exact:
        norms = []
        for band in self._bands(tile):
            shape = band.shape(self._own.spec)
            own = scratch.rows("whole rows", shape)
            self._own.read(band, own, scratch)
            added = scratch.rows("added to whole rows", shape)
            self._product.rows(band, own, added, scratch)
            norms.append(norms_of_rows(own, added))
        return np.concatenate(norms)

    def _bands(self, tile: Tile) -> Iterator[Tile]:
        """The rows of a thinned tile with all of their columns, cut into what a full tile has."""
        step = tile.row_step * grid.tile_rows(self._own.spec)
        for start in range(tile.start, tile.stop, step):
            yield Tile(start, min(start + step, tile.stop), tile.row_step)

    def read_bytes(self, tile: Tile) -> int:
        whole = self._bands(tile) if tile.col_step > 1 else ()
        norms = sum(self._own.read_bytes(band) + self._product.read_bytes(band) for band in whole)
        return norms + self._product.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        spec, whole = self._own.spec, 0
        if tile.col_step > 1:
            band = next(self._bands(tile))
            rows, cols = band.shape(spec)
            whole = 8 * rows * cols + self._own.scratch_bytes(band)
            whole += self._product.scratch_bytes(band)
        return whole + self._product.scratch_bytes(tile) + _FEATURE_BYTES * tile.shape(spec)[0]

    def release(self) -> None:
        self._product.release()
        self._lengths.release()


class DoraOfColumns:
    """A change by which each column gets its length; see `adapted.Change`.

    No tile has a whole column, so the norms are a statistic that it must be given.
    """

    needs_rows = True
    factors: tuple[Factors, ...] = ()

    def __init__(self, files: Files, rows: Source, update: Dora) -> None:
        self._product = Product(files, [update.factors])
        self._lengths = HeldVector(files, update.magnitude)
        self._summed = Adapted(rows, self._product, on_base=False)
        self._norms: Exact | None = None

    @property
    def own_statistics(self) -> tuple[OwnStatistic, ...]:
        spec = self._summed.spec
        nbytes = 8 * spec.cols
        return (
            OwnStatistic(self._summed, lambda: ColumnSquares(spec), self._take, nbytes, nbytes),
        )

    def _take(self, value: StatisticValue) -> None:
        assert isinstance(value, ColumnNorms)
        self._norms = value.norms

    @property
    def resident_bytes(self) -> int:
        norms = 8 * self._summed.spec.cols
        return self._product.resident_bytes + self._lengths.resident_bytes + norms

    @property
    def once_bytes(self) -> int:
        return self._product.once_bytes + self._lengths.once_bytes

    def rows(self, tile: Tile, own: Rows | None, out: Rows, scratch: Scratch) -> None:
        assert own is not None, "it depends on the rows that it changes"
        assert self._norms is not None, "the norms are measured first"
        self._product.rows(tile, own, out, scratch)
        factors = _factors(self._lengths.values(), self._norms)[:: tile.col_step]
        rescale_columns(own, out, np.ascontiguousarray(factors))

    def read_bytes(self, tile: Tile) -> int:
        return self._product.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        return self._product.scratch_bytes(tile) + _FEATURE_BYTES * self._summed.spec.cols

    def release(self) -> None:
        self._product.release()
        self._lengths.release()


def _factors(lengths: NDArray[np.float32], norms: Exact) -> Exact:
    """`m / norm` for each feature; 1 where the norm is 0."""
    empty = norms == 0
    return np.where(empty, 1.0, lengths / np.where(empty, 1.0, norms))
