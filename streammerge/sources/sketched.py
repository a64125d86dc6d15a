"""A dense merged update as two factors: its strongest directions, and the update along them.

`D V' V` is the nearest matrix to the update D whose rows lie in the span of V `[rank, cols]`. V is
found by a statistic of D; then the factors are `D V'`, tile by tile, and V. Both are tensors of
their own with the same waves; the second to come is spared them where the first is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from streammerge import grid
from streammerge.arrays import PerModel, Rows
from streammerge.kernels.casts import round_to
from streammerge.kernels.weighted import sum_of_squares
from streammerge.memory import Scratch
from streammerge.sources.stack import Stack
from streammerge.statistics import sketch
from streammerge.statistics.sketch import Directions
from streammerge.words import (
    DeltaStack,
    DType,
    Fold,
    Merged,
    OwnStatistic,
    StatisticValue,
    TensorSpec,
    Terms,
    Tile,
)

# No parameter of a method can have this name.
_DIRECTIONS = "strongest directions"


class Sketch:
    """What both factors want: an update, merged tile by tile without its base, and its directions.

    `rank` of them, rounded to `dtype` as they will be stored.
    """

    def __init__(self, update: Merged, rank: int, dtype: DType, seed: int) -> None:
        self.update = update
        self.rank = rank
        self.dtype = dtype
        self._seed = seed
        self._values: Mapping[str, StatisticValue] = {}
        self._found: Directions | None = None

    @property
    def spec(self) -> TensorSpec:
        return self.update.spec

    def tiles(self) -> Sequence[Tile]:
        """The grid of the update, which is not that of either factor."""
        return grid.tiles(self.spec)

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        """The statistics of the merge; once these are there, the directions."""
        known = _of_method(values)
        found = self.update.start(state_bytes, known)
        settled = {n: one for n, one in found.items() if isinstance(one, StatisticValue)}
        if len(settled) == len(found) and _DIRECTIONS not in values:
            self._values = {**known, **settled}
            first = self._found or sketch.first_round(self.spec, self.rank, self._seed)
            found = {**found, _DIRECTIONS: first}
        tiles = self.tiles()
        return {
            name: one if isinstance(one, StatisticValue) else _OnGrid(one, tiles)
            for name, one in found.items()
        }

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        if _DIRECTIONS not in folds:
            return self.update.measure(folds, tile, index, scratch)
        stack = Stack(None, [_Rows(self.update, self._values)], tile, index, scratch)
        return {_DIRECTIONS: folds[_DIRECTIONS].measure(stack, scratch)}

    def waves(self) -> Sequence[Sequence[str]]:
        return [*self.update.waves(), *[[_DIRECTIONS]] * sketch.ROUNDS]

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        if _DIRECTIONS in names:
            return self.update.merge_bytes(tile)
        return self.update.measure_bytes(tile, names)

    def state_bytes(self) -> tuple[int, int]:
        least, most = self.update.state_bytes()
        own = sketch.state_bytes(self.spec, self.rank)
        return least + own, most + own

    def part_bytes(self) -> int:
        return max(self.update.part_bytes(), sketch.part_bytes(self.spec, self.rank))

    def scratch_bytes(self, tile: Tile) -> int:
        """Of a tile of the update: merging it, its rows again, and what they come to."""
        rows, cols = tile.shape(self.spec)
        seen = 4 * rows * sketch.width(self.spec, self.rank)
        return self.update.scratch_bytes(tile) + 4 * rows * cols + seen

    def directions(self, values: Mapping[str, StatisticValue], scratch: Scratch) -> Rows:
        """V, rounded."""
        found = values[_DIRECTIONS]
        assert isinstance(found, Directions)
        self._found = found
        rows: Rows = scratch.array("directions", found.rows.shape, np.float32)
        rows[...] = found.rows
        round_to(rows, self.dtype, scratch)
        return rows

    def rows(
        self, tile: Tile, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> Iterator[tuple[int, Rows, PerModel]]:
        """The update's rows of a tile of any grid, in runs: the first row of each, and norms."""
        for index, own in enumerate(self.tiles()):
            if own.stop <= tile.start or own.start >= tile.stop:
                continue
            rows, norms = self.update.merge(own, index, _of_method(values), scratch)
            first, last = max(own.start, tile.start), min(own.stop, tile.stop)
            if own.start < tile.start:  # the tile that has its first row reports them
                norms = np.zeros_like(norms)
            yield first, rows[first - own.start : last - own.start], norms


class Side(Protocol):
    """Which of the two factors."""

    def rows(
        self, tile: Tile, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        """See `Merged.merge`; norms as of a `Pair` that approximates."""
        ...

    def read_bytes(self, tile: Tile) -> int: ...

    def scratch_bytes(self, tile: Tile, inner: Tile) -> int:
        """Besides V: for a tile of the factor, made from tiles of the update like `inner`."""
        ...


class LeftSide:
    """`D V'`, and what `D V' V` misses of D."""

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch

    def rows(
        self, tile: Tile, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        along = self._sketch.directions(values, scratch)
        out: Rows = scratch.array("along", (tile.stop - tile.start, len(along)), np.float32)
        total: PerModel | None = None
        for first, rows, norms in self._sketch.rows(tile, values, scratch):
            mine = out[first - tile.start : first - tile.start + len(rows)]
            np.matmul(rows, along.T, out=mine)
            round_to(mine, self._sketch.dtype, scratch)
            squared = sum_of_squares(rows)
            near: Rows = scratch.array("near", rows.shape, np.float32)
            np.matmul(mine, along, out=near)
            np.subtract(rows, near, out=near)
            found = np.append(norms, (squared, sum_of_squares(near)))
            total = found if total is None else total + found
        assert total is not None  # a tile has a row
        return out, total

    def read_bytes(self, tile: Tile) -> int:
        tiles = self._sketch.tiles()
        own = [one for one in tiles if one.stop > tile.start and one.start < tile.stop]
        return self._sketch.update.merge_bytes(Tile(own[0].start, own[-1].stop))

    def scratch_bytes(self, tile: Tile, inner: Tile) -> int:
        """The factor's rows, and what is near a tile of the update."""
        rows, cols = inner.shape(self._sketch.spec)
        return 4 * (tile.stop - tile.start) * self._sketch.rank + 8 * rows * cols


class RightSide:
    """V."""

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch

    def rows(
        self, tile: Tile, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        rows = self._sketch.directions(values, scratch)
        return rows[tile.start : tile.stop], np.array([np.nan])

    def read_bytes(self, tile: Tile) -> int:
        return 0

    def scratch_bytes(self, tile: Tile, inner: Tile) -> int:
        return 0


class Sketched:
    """One factor of a sketched update; see `Merged`."""

    def __init__(self, spec: TensorSpec, sketch: Sketch, side: Side) -> None:
        self.spec = spec
        self._sketch = sketch
        self._side = side

    @property
    def resident_bytes(self) -> int:
        return self._sketch.update.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._sketch.update.once_bytes

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        return self._sketch.start(state_bytes, values)

    def state_bytes(self) -> tuple[int, int]:
        return self._sketch.state_bytes()

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        return self._sketch.measure(folds, tile, index, scratch)

    def merge(
        self, tile: Tile, index: int, values: Mapping[str, StatisticValue], scratch: Scratch
    ) -> tuple[Rows, PerModel]:
        return self._side.rows(tile, values, scratch)

    def waves(self) -> Sequence[Sequence[str]]:
        return self._sketch.waves()

    def merge_bytes(self, tile: Tile) -> int:
        return self._side.read_bytes(tile)

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        """What is measured are tiles of the update: all of it for all of the factor."""
        whole = tile == Tile(0, self.spec.rows)
        return self._sketch.measure_bytes(Tile(0, self._sketch.spec.rows) if whole else tile, names)

    def part_bytes(self) -> int:
        return self._sketch.part_bytes()

    def scratch_bytes(self, tile: Tile) -> int:
        """V, what the side takes, and a tile of the update."""
        inner = tile if tile.col_step > 1 else grid.largest_tile(self._sketch.spec)
        along = 8 * self._sketch.rank * self._sketch.spec.cols
        own = self._side.scratch_bytes(tile, inner)
        return self._sketch.scratch_bytes(inner) + along + own

    def release(self) -> None:
        self._sketch.update.release()


def _of_method(values: Mapping[str, StatisticValue]) -> dict[str, StatisticValue]:
    return {name: value for name, value in values.items() if name != _DIRECTIONS}


class _OnGrid:
    """A fold of the update, driven for a tensor of another shape; see `Fold`."""

    def __init__(self, fold: Fold, tiles: Sequence[Tile]) -> None:
        self._fold = fold
        self._tiles = tiles

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return self._fold.wants(self._tiles)

    def measure(self, stack: DeltaStack, scratch: Scratch) -> Any:
        return self._fold.measure(stack, scratch)

    def absorb(self, tile_index: int, part: Any) -> None:
        self._fold.absorb(tile_index, part)

    def finish(self) -> Fold | StatisticValue:
        found = self._fold.finish()
        return found if isinstance(found, StatisticValue) else _OnGrid(found, self._tiles)


class _Rows:
    """A merge whose statistics are known, as a source; see `Source`."""

    needs_base = False
    own_statistics: tuple[OwnStatistic, ...] = ()
    resident_bytes = 0
    once_bytes = 0

    def __init__(self, merged: Merged, values: Mapping[str, StatisticValue]) -> None:
        self._merged = merged
        self._values = values

    @property
    def spec(self) -> TensorSpec:
        return self._merged.spec

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        index = tile.start // grid.tile_rows(self.spec)
        out[...] = self._merged.merge(tile, index, self._values, scratch)[0]

    def delta(self, tile: Tile, base_rows: Rows | None, out: Rows, scratch: Scratch) -> None:
        self.read(tile, out, scratch)

    def terms(self) -> Terms:
        return Terms(self)

    def read_bytes(self, tile: Tile) -> int:
        return self._merged.merge_bytes(tile)

    def scratch_bytes(self, tile: Tile) -> int:
        return self._merged.scratch_bytes(tile)

    def release(self) -> None:
        """The merge's own."""
