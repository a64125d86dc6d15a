"""A dense merged update as two factors: its strongest directions, and the update along them.

`D V' V` is the nearest matrix to the update D whose rows lie in the span of V `[rank, cols]`. V is
found by a statistic of D, `D V'` by another. Both factors are tensors of their own that want the
same statistics; whichever comes second takes over those of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from streammerge import grid
from streammerge.arrays import PerModel, Rows
from streammerge.kernels.casts import round_to
from streammerge.kernels.weighted import sum_of_squares
from streammerge.scratch import Scratch
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

# No parameter of a method can have these names.
_DIRECTIONS = "strongest directions"
_ALONG = "along them"


class Sketch:
    """What both factors want: the directions of an update, merged without its base, and it in them.

    `rank` of them, rounded to `dtype` as they will be stored. `turned` says that the factors are
    those of the transpose.
    """

    def __init__(
        self, update: Merged, rank: int, dtype: DType, seed: int, *, turned: bool = False
    ) -> None:
        self.update = update
        self.rank = rank
        self.dtype = dtype
        self.turned = turned
        self._seed = seed
        self._values: Mapping[str, StatisticValue] = {}
        self._found: Mapping[str, StatisticValue] = {}

    @property
    def spec(self) -> TensorSpec:
        return self.update.spec

    def start(
        self, state_bytes: int, values: Mapping[str, StatisticValue]
    ) -> dict[str, Fold | StatisticValue]:
        """The statistics of the merge; then the directions; then the update along them."""
        if self._found:
            return {name: one for name, one in self._found.items() if name not in values}
        known = {n: one for n, one in values.items() if n not in (_DIRECTIONS, _ALONG)}
        found = self.update.start(state_bytes, known)
        settled = {n: one for n, one in found.items() if isinstance(one, StatisticValue)}
        if len(settled) == len(found):
            self._values = {**known, **settled}
            found |= self._own(values)
        return found

    def _own(self, values: Mapping[str, StatisticValue]) -> dict[str, Fold]:
        if _DIRECTIONS not in values:
            return {_DIRECTIONS: sketch.first_round(self.spec, self.rank, self._seed)}
        if _ALONG not in values:
            return {_ALONG: _Collected(self.spec, _directions(values), self.dtype)}
        return {}

    def measure(
        self, folds: Mapping[str, Fold], tile: Tile, index: int, scratch: Scratch
    ) -> dict[str, Any]:
        own = folds.keys() & {_DIRECTIONS, _ALONG}
        if not own:
            return self.update.measure(folds, tile, index, scratch)
        (name,) = own  # each waits for all that come before it
        shown = _Rows(self.update, self._values)
        part = folds[name].measure(Stack(None, [shown], tile, index, scratch), scratch)
        return {name: (part, shown.norms) if name == _ALONG else part}

    def waves(self) -> Sequence[Sequence[str]]:
        return [*self.update.waves(), *[[_DIRECTIONS]] * sketch.ROUNDS, [_ALONG]]

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        if _DIRECTIONS in names or _ALONG in names:
            return self.update.merge_bytes(tile)
        return self.update.measure_bytes(tile, names)

    def state_bytes(self) -> tuple[int, int]:
        least, most = self.update.state_bytes()
        along = 4 * self.rank * (self.spec.rows + 2 * self.spec.cols)
        own = sketch.state_bytes(self.spec, self.rank) + along
        return least + own, most + own

    def part_bytes(self) -> int:
        along = 4 * self.rank * grid.tile_rows(self.spec)
        return max(self.update.part_bytes(), sketch.part_bytes(self.spec, self.rank), along)

    def scratch_bytes(self, tile: Tile) -> int:
        """Of a tile of the update: merging it, its rows again, and what they come to."""
        rows, cols = tile.shape(self.spec)
        seen = 4 * rows * sketch.width(self.spec, self.rank)
        return self.update.scratch_bytes(tile) + 2 * 4 * rows * cols + seen

    def factor(self, which: Literal["A", "B"], values: Mapping[str, StatisticValue]) -> Rows:
        """A `[rank, in]` or B `[out, rank]`, held by the statistics."""
        self._found = values
        held = _directions(values) if (which == "A") != self.turned else _along(values).rows
        return held.T if self.turned else held

    def norms(self, values: Mapping[str, StatisticValue]) -> PerModel:
        """Squared norms as of a `Pair` that approximates, after that of the base."""
        return _along(values).norms


@dataclass(frozen=True, slots=True)
class _Along:
    """`D V'`, `[rows, rank]`, and squared norms: of the models, of D, of what `D V' V` misses."""

    rows: Rows
    norms: PerModel

    def at(self, tile_index: int) -> Rows:
        return self.rows


def _directions(values: Mapping[str, StatisticValue]) -> Rows:
    found = values[_DIRECTIONS]
    assert isinstance(found, Directions)
    return found.rows


def _along(values: Mapping[str, StatisticValue]) -> _Along:
    found = values[_ALONG]
    assert isinstance(found, _Along)
    return found


class _Collected:
    """The fold that gathers `D V'`, both factors rounded as they will be stored; see `Fold`."""

    def __init__(self, spec: TensorSpec, directions: Rows, dtype: DType) -> None:
        self._directions = directions.copy()
        round_to(self._directions, dtype, Scratch())
        self._dtype = dtype
        self._rows: Rows = np.empty((spec.rows, len(directions)), np.float32)
        self._filled = 0
        self._norms: PerModel | None = None

    def wants(self, grid: Sequence[Tile]) -> Sequence[Tile]:
        return grid

    def measure(self, stack: DeltaStack, scratch: Scratch) -> tuple[Rows, PerModel]:
        """The tile's rows of `D V'`, and squared norms of D and of what is missed."""
        rows = stack.one(0)
        mine = rows @ self._directions.T
        round_to(mine, self._dtype, scratch)
        squared = sum_of_squares(rows)
        near = scratch.rows("near", rows.shape)
        np.matmul(mine, self._directions, out=near)
        np.subtract(rows, near, out=near)
        return mine, np.array((squared, sum_of_squares(near)))

    def absorb(self, tile_index: int, part: tuple[tuple[Rows, PerModel], PerModel]) -> None:
        """Parts come in the order of the rows; each with the norms that the merge reports."""
        (rows, squared), norms = part
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)
        found = np.append(norms, squared)
        self._norms = found if self._norms is None else self._norms + found

    def finish(self) -> StatisticValue:
        assert self._norms is not None  # a tensor has a tile
        return _Along(self._rows, self._norms)


class Sketched:
    """One factor of a sketched update, as a LoRA names it; see `Merged`.

    A comes first and measures; B takes over what was found, and measures where A was there before.
    """

    def __init__(self, spec: TensorSpec, sketch: Sketch, which: Literal["A", "B"]) -> None:
        self.spec = spec
        self._sketch = sketch
        self._which = which

    @property
    def measured(self) -> TensorSpec:
        """The update."""
        return self._sketch.spec

    @property
    def resident_bytes(self) -> int:
        return self._sketch.update.resident_bytes

    @property
    def once_bytes(self) -> int:
        return self._sketch.update.once_bytes if self._which == "A" else 0

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
        """Rows of the factor; the norms of the whole update come with the first of B."""
        held = self._sketch.factor(self._which, values)
        rows = scratch.rows("factor", (tile.stop - tile.start, held.shape[1]))
        rows[...] = held[tile.start : tile.stop]
        if self._which == "A":
            return rows, np.array([np.nan])
        norms = self._sketch.norms(values)
        return rows, norms if tile.start == 0 else np.zeros_like(norms)

    def waves(self) -> Sequence[Sequence[str]]:
        return self._sketch.waves() if self._which == "A" else ()

    def merge_bytes(self, tile: Tile) -> int:
        return 0

    def measure_bytes(self, tile: Tile, names: Sequence[str]) -> int:
        return self._sketch.measure_bytes(tile, names)

    def part_bytes(self) -> int:
        return self._sketch.part_bytes()

    def scratch_bytes(self, tile: Tile) -> int:
        """A tile of the update to measure, or of the factor."""
        inner = tile if tile.col_step > 1 else grid.largest_tile(self._sketch.spec)
        rows, cols = tile.shape(self.spec)
        return self._sketch.scratch_bytes(inner) + 4 * rows * cols

    def release(self) -> None:
        self._sketch.update.release()


class _Rows:
    """A merge whose statistics are known, as a source; see `Source`."""

    needs_base = False
    own_statistics: tuple[OwnStatistic, ...] = ()
    resident_bytes = 0
    once_bytes = 0

    def __init__(self, merged: Merged, values: Mapping[str, StatisticValue]) -> None:
        self._merged = merged
        self._values = values
        self.norms: PerModel = np.zeros(0)  # that the merge reported of the tile read last

    @property
    def spec(self) -> TensorSpec:
        return self._merged.spec

    def read(self, tile: Tile, out: Rows, scratch: Scratch) -> None:
        index = tile.start // grid.tile_rows(self.spec)
        out[...], self.norms = self._merged.merge(tile, index, self._values, scratch)

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
