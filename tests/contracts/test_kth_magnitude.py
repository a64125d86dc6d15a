"""The k-th magnitude: exact whatever the sample, the bracket, the bins and the split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from streammerge.declarations import Declared, Knobs
from streammerge.kernels import Cut, trim
from streammerge.kernels.prune import ABOVE_ALL, keys
from streammerge.scratch import Scratch
from streammerge.statistics import KthMagnitude, tally
from streammerge.statistics.select import Counting, Subject, Thresholds, each_model
from streammerge.statistics.tally import Bracket, Part, collect
from streammerge.words import DType, StatisticValue, TensorSpec, Tile
from tests.contracts.statistic_contract import (
    StatisticContract,
    awkward,
    cut_rows,
    deceptive,
    fold_over,
)
from tests.oracles.dense import Single, keep_largest

DENSITIES = (0.3, 0.9, 0.004, 0.5, 0.75, 0.9999, 0.2501, 0.7499)


def density(*shares: float) -> Knobs:
    return Knobs({"density": np.array(shares)}, {}, len(shares), tuple(range(len(shares))))


def trimmed(value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile]) -> list[Single]:
    """What the cuts of all tiles leave of each model, stacked."""
    stacks = []
    for index, tile in enumerate(grid):
        stack = np.array([delta[tile.start : tile.stop] for delta in deltas])
        cut = value.at(index)
        assert isinstance(cut, Cut)
        stacks.append(trim(stack, cut))
    return list(np.concatenate(stacks, axis=1))


def assert_kept(
    value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], shares: Sequence[float]
) -> None:
    for delta, share, kept in zip(deltas, shares, trimmed(value, deltas, grid), strict=True):
        np.testing.assert_array_equal(kept, keep_largest(delta, share).astype(np.float32))


class TestKthMagnitude(StatisticContract):
    statistic = KthMagnitude(keep="density")

    def knobs(self, models: int, seed: int) -> Knobs:
        return density(*(DENSITIES[(seed + i) % len(DENSITIES)] for i in range(models)))

    def assert_value(
        self, value: StatisticValue, deltas: Sequence[Single], grid: Sequence[Tile], knobs: Knobs
    ) -> None:
        assert_kept(value, deltas, grid, list(knobs.per_model["density"]))

    def part_nbytes(self, part: Any) -> int:
        return sum(one.nbytes for one in part.values() if isinstance(one, Part))

    def test_it_wants_no_read_to_keep_everything(self) -> None:
        delta = awkward("few values", (6, 7), 0)
        assert self.hold([delta, delta], cut_rows(6, 3), density(1, 1)) == 0
        assert self.statistic.reads(density(1, 1)) == 0
        assert self.statistic.reads(density(1, 0.5)) == 1

    @pytest.mark.parametrize("kind", ["few values", "zeros", "denormal"])
    def test_every_k_of_a_small_tensor(self, kind: str) -> None:
        delta = awkward(kind, (9, 5), 1)
        for k in range(46):
            self.hold([delta], cut_rows(9, 2, 3, 7), density((k + 0.5) / 45 if k else 1e-9))

    @pytest.mark.parametrize("share", DENSITIES)
    def test_every_density_where_the_sample_lies(self, share: float) -> None:
        for delta in deceptive(640, 64):
            self.hold([delta], cut_rows(640, 100, 300, 301), density(share))

    def test_differences_of_bfloat16_models_have_many_equals(self) -> None:
        """The lowest index wins across tiles, and exactly k stay."""
        rng = np.random.default_rng(0)
        bits = (rng.normal(size=(2, 320, 128)).astype(np.float32).view(np.uint32) >> 16) << 16
        base, moved = bits.view(np.float32)
        delta = np.where(rng.random(base.shape) < 0.7, 2.0**-7, moved - base).astype(np.float32)
        grid = cut_rows(320, *range(0, 320, 13))
        for share in (0.05, 0.31, 0.6, 0.8):
            spec = TensorSpec("w", delta.shape, DType.BF16)
            value, _ = fold_over(self.statistic.start(spec, density(share), {}, 0), [delta], grid)
            kept = trimmed(value, [delta], grid)[0]
            assert np.count_nonzero(kept) == int(share * delta.size)
            np.testing.assert_array_equal(kept, keep_largest(delta, share).astype(np.float32))

    @pytest.mark.parametrize("share", [0.45, 0.55, 0.8])
    def test_more_are_asked_for_than_are_not_zero(self, share: float) -> None:
        """As in a fine-tuned embedding of which many rows were never touched."""
        rng = np.random.default_rng(5)
        delta = (0.1 + 0.1 * rng.random((640, 256))).astype(np.float32)
        delta[rng.random(640) < 0.5] = 0
        delta[::9] = 1 + rng.random((72, 256))  # what the sample sees is larger, and never zero
        for grid in (cut_rows(640), cut_rows(640, *range(0, 640, 170))):
            self.hold([delta], grid, density(share))


def test_a_part_counts_equal_magnitudes_and_keeps_others_as_they_came() -> None:
    rng = np.random.default_rng(3)
    different = 1 + rng.random((64, 100)).astype(np.float32)
    equal = np.round(16 * different) / np.float32(16)
    for rows, nbytes in ((different, 4 * different.size), (equal, 8 * len(np.unique(equal)))):
        part = collect(rows, Bracket(1), Scratch())
        assert part.nbytes == nbytes
        assert part.inside == rows.size
        for key in (1, int(keys(equal)[0, 0]), int(keys(equal)[0, 0]) + 1, ABOVE_ALL):
            assert part.below(key) == np.sum(keys(rows) < key)


class TestNarrowing:
    """Small bins and a small state, so that a few hundred elements take every way there is."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tally, "BINS", 16)
        monkeypatch.setattr(tally, "MOST_KEYS", 6)

    @pytest.mark.parametrize("each", [200, 1000, 1 << 20])
    @pytest.mark.parametrize("share", [0.003, 0.2, 0.5, 0.9, 0.999])
    @pytest.mark.parametrize(
        "bracket", [(1, ABOVE_ALL), (1, 2), (0x3F800000, 0x3F800001), (0x30000000, 0x3F000000)]
    )
    def test_any_bracket_comes_to_the_same(
        self, each: int, share: float, bracket: tuple[int, int]
    ) -> None:
        rng = np.random.default_rng(1)
        for delta in (
            rng.normal(size=(31, 11)).astype(np.float32),
            awkward("few values", (31, 11), 2),
            awkward("zeros", (31, 11), 2),
            np.where(rng.random((31, 11)) < 0.5, 0, rng.normal(size=(31, 11))).astype(np.float32),
        ):
            grid = cut_rows(31, 3, 4, 17)
            spec = TensorSpec("w", delta.shape, DType.F32)
            pending = {0: Bracket(max(1, int(share * delta.size)), *bracket)}
            fold = Counting(Subject(spec, each_model), pending, Thresholds(1), each)
            value, _ = fold_over(fold, [delta], grid)
            assert_kept(value, [delta], grid, [share])

    def test_models_that_need_different_numbers_of_reads(self) -> None:
        rng = np.random.default_rng(2)
        deltas = [rng.normal(size=(31, 11)).astype(np.float32), awkward("equal", (31, 11), 0)]
        grid = cut_rows(31, 10, 20)
        spec = TensorSpec("w", (31, 11), DType.F32)
        pending = {0: Bracket(100, 1, 2), 1: Bracket(7)}
        value, reads = fold_over(
            Counting(Subject(spec, each_model), pending, Thresholds(2), 1 << 20),
            deltas,
            grid,
        )
        assert reads > 2
        assert_kept(value, deltas, grid, [100.5 / 341, 7.5 / 341])


def test_a_knob_that_is_not_there_is_refused() -> None:
    declared = Declared(frozenset({"density", "weight"}), frozenset({"normalize"}), frozenset())
    with pytest.raises(TypeError, match="densty"):
        KthMagnitude(keep="densty").check(declared)
    KthMagnitude(keep="density").check(declared)
