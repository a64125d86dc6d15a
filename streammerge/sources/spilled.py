"""Rows that are made once and read back from disk afterwards."""

from __future__ import annotations

from collections.abc import Callable

from streammerge import grid
from streammerge.arrays import Rows
from streammerge.scratch import Scratch
from streammerge.storage.spill import SpillArray
from streammerge.words import OwnStatistic, Source, TensorSpec, Terms, Tile


class Spilled:
    """Another source, whose tiles are kept in a spill array from when they are first made.

    What the array is said to hold is kept, the deltas or the rows themselves: a merge reads one of
    the two. Float32 as it was made, so the bits are the same as without it.
    """

    def __init__(self, source: Source, array: SpillArray, place: int) -> None:
        """`place` is the model's among those of the array."""
        self._source = source
        self._array = array
        self._place = place

    @property
    def spec(self) -> TensorSpec:
        return self._source.spec

    @property
    def needs_base(self) -> bool:
        return self._source.needs_base

    @property
    def own_statistics(self) -> tuple[OwnStatistic, ...]:
        return self._source.own_statistics

    @property
    def resident_bytes(self) -> int:
        return self._source.resident_bytes

    @property
    def once_bytes(self) -> int:
        """Everything is read once."""
        whole = Tile(0, self.spec.rows)
        return self._source.once_bytes + self._source.read_bytes(whole)

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        if self._array.kind == "deltas":
            self._source.read(tile, out, scratch)
            return
        self._keep(tile, out, lambda: self._source.read(tile, out, scratch))

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        if self._array.kind == "weights":
            self._source.delta(tile, base_rows, out, scratch)
            return
        self._keep(tile, out, lambda: self._source.delta(tile, base_rows, out, scratch))

    def _keep(self, tile: Tile, out: Rows, make: Callable[[], None]) -> None:
        index = self._index(tile)
        if index is None:
            make()
        elif self._array.holds(self._place, index):
            self._array.read(self._place, index, out)
        else:
            make()
            self._array.write(self._place, index, out)

    def _index(self, tile: Tile) -> int | None:
        """Its place in the grid; a sample has none, and is made each time."""
        index, rest = divmod(tile.start, grid.tile_rows(self.spec))
        stop = min(tile.start + grid.tile_rows(self.spec), self.spec.rows)
        return None if rest or tile != Tile(tile.start, stop) else index

    def terms(self) -> Terms:
        return self._source.terms()

    def read_bytes(self, tile: Tile) -> int:
        """Of a sample; all else is counted by `once_bytes`."""
        return 0 if tile.row_step == tile.col_step == 1 else self._source.read_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        return self._source.scratch_bytes(tile)

    def release(self) -> None:
        self._source.release()
        self._array.drop()
