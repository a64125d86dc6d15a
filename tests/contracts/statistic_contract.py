"""What every statistic owes: the naive value of the whole tensor, however it is split and held.

A subclass gives the statistic and what it must come to. `fold_over` drives folds as the scheduler
does: any order of measuring, absorbed in grid order, as many reads as they ask for.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from streammerge.arrays import Deltas
from streammerge.declarations import Knobs, Statistic
from streammerge.kernels.product import gram
from streammerge.planning.cost import State
from streammerge.scratch import Scratch
from streammerge.statistics.saved import restored, saved
from streammerge.words import DType, Fold, StatisticValue, TensorSpec, Tile
from tests.oracles.dense import Exact, Single

OBJECT_BYTES = 24 << 10  # of Python's own small objects
MOST_READS = 40  # a fold that asks for more than this will never be content


class ArrayStack:
    """Whole deltas in memory, as the stack of one tile; every call gives the same buffer."""

    def __init__(self, deltas: Sequence[Single], tile: Tile, index: int, scratch: Scratch) -> None:
        self.index = index
        rows = slice(tile.start, tile.stop, tile.row_step)
        self._parts = [delta[rows, :: tile.col_step] for delta in deltas]
        self._scratch = scratch

    def one(self, model: int) -> Single:
        out: Single = self._scratch.array("rows", self._parts[model].shape, np.float32)
        out[...] = self._parts[model]
        return out

    def all(self) -> Deltas:
        shape = (len(self._parts), *self._parts[0].shape)
        out: Deltas = self._scratch.array("deltas", shape, np.float32)
        out[...] = self._parts
        return out

    def base(self) -> Single:
        raise NotImplementedError

    def gram(self) -> Exact:
        return gram(self.all().reshape(len(self._parts), -1))


def cut_rows(rows: int, *tops: int) -> list[Tile]:
    """Tiles that start at row 0 and at each of the given rows."""
    edges = [0, *sorted({top for top in tops if 0 < top < rows}), rows]
    return [Tile(start, stop) for start, stop in pairwise(edges)]


def fold_over(
    first: Fold | StatisticValue,
    deltas: Sequence[Single],
    grid: Sequence[Tile],
    *,
    seed: int = 0,
    held: list[Any] | None = None,
) -> tuple[StatisticValue, int]:
    """The value, and how many reads of the whole tensor it took; parts are noted in `held`."""
    chance, reads, found = random.Random(seed), 0, first
    while not isinstance(found, StatisticValue):
        tiles = found.wants(grid)
        reads += all(tile.row_step == tile.col_step == 1 for tile in tiles)
        assert reads <= MOST_READS, "the folds never come to an end"
        order = list(range(len(tiles)))
        chance.shuffle(order)
        scratch = Scratch()  # one for all: a part must not live in it
        parts = {i: found.measure(ArrayStack(deltas, tiles[i], i, scratch), scratch) for i in order}
        if held is not None:
            held += parts.values()
        for index in range(len(tiles)):
            found.absorb(index, parts[index])
        found = found.finish()
    return found, reads


class StatisticContract:
    """Inherit, and say which statistic it is and what the naive expression gives."""

    statistic: ClassVar[Statistic]

    def knobs(self, models: int, seed: int) -> Knobs:
        """Parameters for a number of models."""
        raise NotImplementedError

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        """Hold a finished statistic to the naive expression of the whole tensors."""
        raise NotImplementedError

    def part_nbytes(self, part: Any) -> int:
        """How many bytes a measured part holds."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------ the suite

    def hold(
        self,
        deltas: Sequence[Single],
        grid: Sequence[Tile],
        knobs: Knobs,
        *,
        state_bytes: int = 1 << 20,
        seed: int = 0,
    ) -> int:
        """Fold over deltas `[rows, cols]` and check; returns the number of reads."""
        spec = TensorSpec("w", deltas[0].shape, DType.F32)
        first = self.statistic.start(spec, knobs, {}, state_bytes)
        held: list[Any] = []
        value, reads = fold_over(first, deltas, grid, seed=seed, held=held)
        self.assert_value(value, deltas, grid, knobs)
        written = json.loads(json.dumps(saved(value)))  # as a run that is stopped writes it down
        self.assert_value(restored(written), deltas, grid, knobs)
        most = max((self.part_nbytes(part) for part in held), default=0)
        assert most <= self.statistic.part_bytes(spec, knobs), "a measured part"
        return reads

    @pytest.mark.parametrize("tops", [(), (1,), (39,), (7, 20, 21), range(40)])
    @pytest.mark.parametrize("state_bytes", [0, 1 << 12, 1 << 24])
    def test_any_split_and_state_give_the_naive_value(
        self, tops: Sequence[int], state_bytes: int
    ) -> None:
        rng = np.random.default_rng(len(tops))
        deltas = [rng.normal(size=(40, 25)).astype(np.float32) for _ in range(3)]
        self.hold(deltas, cut_rows(40, *tops), self.knobs(3, 1), state_bytes=state_bytes)

    def test_any_order_of_measuring_gives_the_naive_value(self) -> None:
        rng = np.random.default_rng(0)
        deltas = [rng.normal(size=(64, 16)).astype(np.float32) for _ in range(2)]
        for seed in range(5):
            self.hold(deltas, cut_rows(64, *range(0, 64, 5)), self.knobs(2, seed), seed=seed)

    @pytest.mark.parametrize("kind", ["zeros", "equal", "denormal", "signed zeros", "few values"])
    @pytest.mark.parametrize("shape", [(24, 10), (1, 300), (300, 1), (1, 1)])
    def test_awkward_values(self, kind: str, shape: tuple[int, int]) -> None:
        rows = shape[0]
        for seed in range(3):
            deltas = [awkward(kind, shape, seed + model) for model in range(2)]
            self.hold(deltas, cut_rows(rows, rows // 3, rows // 2), self.knobs(2, seed))

    def test_large_tensors_take_as_many_reads_as_were_planned(self) -> None:
        for number, deltas in enumerate(ordinary(512, 256)):
            knobs = self.knobs(1, number)
            reads = self.hold([deltas], cut_rows(512, *range(0, 512, 100)), knobs)
            assert reads <= self.statistic.reads(knobs), number

    def test_parts_of_a_tall_tensor_are_within_its_word(self) -> None:
        tall = np.random.default_rng(6).normal(size=(8192, 128)).astype(np.float32)
        self.hold([tall], cut_rows(8192, 4096), self.knobs(1, 0))

    @pytest.mark.parametrize("state_bytes", [0, 1 << 20, 4 << 20])
    def test_its_state_is_within_its_word(self, state_bytes: int) -> None:
        """Three models of which everything is kept as long as there is room."""
        rng = np.random.default_rng(7)
        deltas = [rng.random((200, 2000)).astype(np.float32) for _ in range(3)]
        for delta in deltas:
            delta[::5] += 10  # a sample of these rows says nothing of the others
        spec, knobs = TensorSpec("w", (200, 2000), DType.F32), self.knobs(3, 3)
        allowed = State(*self.statistic.state_bytes(spec, knobs)).within(state_bytes)
        found: Fold | StatisticValue = self.statistic.start(spec, knobs, {}, state_bytes)
        grid = cut_rows(200, *range(0, 200, 15))
        while not isinstance(found, StatisticValue):
            peak, found = _peak_of_state(found, deltas, grid)
            part = self.statistic.part_bytes(spec, knobs)
            assert peak <= allowed + part + OBJECT_BYTES

    @pytest.mark.parametrize("state_bytes", [0, 1 << 26])
    def test_large_tensors_whose_sample_lies(self, state_bytes: int) -> None:
        for number, deltas in enumerate(deceptive(640, 256)):
            grid = cut_rows(640, *range(0, 640, 170))
            self.hold([deltas], grid, self.knobs(1, number), state_bytes=state_bytes)


def _peak_of_state(
    fold: Fold, deltas: Sequence[Single], grid: Sequence[Tile]
) -> tuple[int, Fold | StatisticValue]:
    """The most that a fold holds while it takes its parts, one of which is in flight."""
    scratch = Scratch()
    peak = 0
    tracemalloc.start()
    try:
        for index, tile in enumerate(fold.wants(grid)):
            part = fold.measure(ArrayStack(deltas, tile, index, scratch), scratch)
            tracemalloc.reset_peak()
            fold.absorb(index, part)
            part = None
            peak = max(peak, tracemalloc.get_traced_memory()[1] - scratch.nbytes)
        return peak, fold.finish()
    finally:
        tracemalloc.stop()


def awkward(kind: str, shape: tuple[int, int], seed: int) -> Single:
    """Values that folds trip over."""
    rng = np.random.default_rng(seed)
    if kind == "zeros":
        return np.zeros(shape, np.float32)
    if kind == "equal":
        return np.full(shape, 0.25, np.float32) * rng.choice([-1, 1], shape).astype(np.float32)
    if kind == "denormal":
        return (rng.integers(-9, 10, shape) * 2.0**-149).astype(np.float32)
    if kind == "signed zeros":
        return np.where(rng.random(shape) < 0.5, -0.0, 0.0).astype(np.float32)
    return (rng.integers(-3, 4, shape) * 0.5).astype(np.float32)


def ordinary(rows: int, cols: int) -> Iterator[Single]:
    """Task vectors as they come: dense, clustered by rows, of low rank, of few values."""
    rng = np.random.default_rng(3)
    normal: NDArray[np.float64] = rng.normal(size=(rows, cols))
    yield normal.astype(np.float32)
    yield (normal * np.exp(rng.normal(size=(rows, 1)))).astype(np.float32)
    yield (rng.normal(size=(rows, 4)) @ rng.normal(size=(4, cols))).astype(np.float32)
    yield (np.rint(8 * normal) / 1024).astype(np.float32)


def deceptive(rows: int, cols: int) -> Iterator[Single]:
    """Tensors of which no thin sample of rows or columns says anything true."""
    rng = np.random.default_rng(4)
    normal: NDArray[np.float64] = rng.normal(size=(rows, cols))
    stripes = np.zeros((rows, cols))
    stripes[1::2] = normal[1::2]  # every second row is zero
    yield stripes.astype(np.float32)
    blocks = normal.copy()
    blocks[: rows // 2] *= 1e-6  # one half is far smaller
    yield blocks.astype(np.float32)
    spikes = normal * 1e-3
    spikes[5::97] *= 1e6  # a few rows hold everything large
    yield spikes.astype(np.float32)
    for kept in range(4):
        sparse = np.zeros((rows, cols))
        sparse[kept::4] = 1 + np.abs(normal[kept::4])  # large where a sample of rows may not look
        yield sparse.astype(np.float32)
        dense = 1 + np.abs(normal)
        dense[kept::4] = 0
        yield dense.astype(np.float32)
