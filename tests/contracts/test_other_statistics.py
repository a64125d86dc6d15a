"""Inner products, sums, factors and selections of computed values; see `statistic_contract`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from streammerge.declarations import Declared, Knobs, KnobValue, Statistic
from streammerge.kernels import trim
from streammerge.kernels.prune import magnitude_of
from streammerge.statistics import Gram, KthValue, Rescaling, Sums
from streammerge.statistics.tally import Part
from streammerge.words import DType, StatisticValue, TensorSpec, Tile
from tests.contracts.statistic_contract import StatisticContract, cut_rows, fold_over
from tests.oracles.dense import Exact, Single, keep_largest


def plain(models: int, **shared: KnobValue) -> Knobs:
    return Knobs({"density": np.full(models, 0.5)}, shared, models, tuple(range(models)))


class PartsAreArrays(StatisticContract):
    def part_nbytes(self, part: Any) -> int:
        return int(part.nbytes)

    def knobs(self, models: int, seed: int) -> Knobs:
        return plain(models, rescale="l1", topk=(0.3, 0.9, 0.02)[seed % 3])


class TestGram(PartsAreArrays):
    statistic = Gram()

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        flat = np.array(deltas, np.float64).reshape(len(deltas), -1)
        np.testing.assert_allclose(value.at(0), flat @ flat.T, rtol=1e-12, atol=1e-200)


class TestGramOfRows(PartsAreArrays):
    statistic = Gram(over=lambda: "each row")

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        stack = np.array(deltas, np.float64)
        expected = np.einsum("irc,jrc->rij", stack, stack)[:, None]
        np.testing.assert_allclose(value.at(0), expected, rtol=1e-12, atol=1e-200)


class TestGramOfColumns(PartsAreArrays):
    statistic = Gram(over=lambda: "each column")

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        stack = np.array(deltas, np.float64)
        expected = np.einsum("irc,jrc->cij", stack, stack)[None]
        np.testing.assert_allclose(value.at(0), expected, rtol=1e-12, atol=1e-200)


def above_one(deltas: Single) -> Exact:
    return np.sum(deltas > 1, axis=(1, 2), dtype=np.float64)


class TestSums(PartsAreArrays):
    statistic = Sums(of=above_one)

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        assert value.at(0).tolist() == [int((delta > 1).sum()) for delta in deltas]


def without_negatives(deltas: Single) -> Single:
    np.maximum(deltas, 0, out=deltas)
    return deltas


class TestRescaling(PartsAreArrays):
    statistic = Rescaling(of=without_negatives)

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        for delta, factor in zip(deltas, value.at(0), strict=True):
            old = np.abs(delta.astype(np.float64)).sum()
            new = np.maximum(delta.astype(np.float64), 0).sum()
            expected = 1.0 if old < 1e-7 or new < 1e-7 else old / new
            np.testing.assert_allclose(factor, expected, rtol=1e-12)

    def test_only_l1_takes_a_read(self) -> None:
        for rescale, reads in (("none", 0), ("density", 0), ("l1", 1)):
            assert self.statistic.reads(plain(2, rescale=rescale)) == reads
        everything = Knobs({"density": np.ones(2)}, {"rescale": "l1"}, 2, (0, 1))
        assert self.statistic.reads(everything) == 0


def farthest(deltas: Single) -> Single:
    return np.asarray(np.abs(deltas).max(axis=0))


def share_of_nonzero(nonzero: int, topk: float) -> int:
    return int(topk * nonzero)


class TestKthValue(PartsAreArrays):
    statistic: ClassVar[Statistic] = KthValue(of=farthest, counts=(share_of_nonzero,))

    def part_nbytes(self, part: Any) -> int:
        return sum(one.nbytes for one in part.values() if isinstance(one, Part))

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        values = farthest(np.array(deltas))
        count = int(float(knobs.shared["topk"]) * np.count_nonzero(values))
        expected = keep_largest(values, (count + 0.5) / values.size) if count else 0 * values
        kept = [
            trim(values[None, tile.start : tile.stop].copy(), value.at(index))[0]
            for index, tile in enumerate(grid)
        ]
        np.testing.assert_array_equal(np.concatenate(kept), expected)


def quartile(numel: int) -> int:
    return numel - (numel - 1) // 4


def middle(numel: int) -> int:
    return numel - (numel - 1) // 2


class TestQuantiles(TestKthValue):
    """Two counts of the same values."""

    statistic = KthValue(of=farthest, counts=(middle, quartile), whole_rows=True)

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        ordered = np.sort(farthest(np.array(deltas)).reshape(-1))
        found = [magnitude_of(key) for key in value.at(0).thresholds]
        assert found == [ordered[(ordered.size - 1) // 2], ordered[(ordered.size - 1) // 4]]


def test_models_that_leave_a_tensor_alone_have_zeros() -> None:
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(20, 30)).astype(np.float32)
    knobs = Knobs({}, {}, 4, (2,))
    first = Gram().start(TensorSpec("w", (20, 30), DType.F32), knobs, {}, 0)
    found, _ = fold_over(first, [delta], cut_rows(20, 7))
    expected = np.zeros((4, 4))
    expected[2, 2] = np.sum(delta.astype(np.float64) ** 2)
    np.testing.assert_allclose(found.at(0), expected)


@pytest.mark.parametrize(
    "statistic",
    [
        Gram(over=lambda flat: "tensor"),
        Sums(of=lambda deltas, cut: None),
        Rescaling(of=lambda deltas, cut: None),
        KthValue(of=farthest, counts=(share_of_nonzero,)),
    ],
)
def test_names_that_are_not_declared_before_are_refused(statistic: Statistic) -> None:
    declared = Declared(frozenset({"density"}), frozenset({"rescale"}), frozenset())
    with pytest.raises(TypeError, match=r"flat|cut|topk"):
        statistic.check(declared)
