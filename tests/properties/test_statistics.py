"""The k-th magnitude of drawn tensors: any values, brackets, bins, states and cuts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.declarations import Knobs
from streammerge.kernels import trim
from streammerge.kernels.prune import ABOVE_ALL, keys
from streammerge.statistics import KthMagnitude, select, tally
from streammerge.statistics.select import Counting, Subject, Thresholds, each_model
from streammerge.statistics.tally import Bracket
from streammerge.words import DType, StatisticValue, TensorSpec
from tests.contracts.statistic_contract import cut_rows, fold_over
from tests.oracles.dense import Single, keep_largest

THOROUGH = settings(max_examples=300, deadline=None, derandomize=True)

# Few distinct values make many equals; any float makes none.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -0.5, 2.0**-149, -(2.0**-130), 3e38])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def tensors(draw: st.DrawFn) -> Single:
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    numbers = draw(st.sampled_from([VALUES, FLOATS, VALUES | FLOATS]))
    drawn = draw(st.lists(numbers, min_size=rows * cols, max_size=rows * cols))
    return np.array(drawn, np.float32).reshape(rows, cols)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """So that tensors of this size are sampled, binned and narrowed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "BINS", 8)
        patch.setattr(tally, "MOST_KEYS", 4)
        patch.setattr(select, "_SAMPLE_FROM", 24)
        patch.setattr(select, "_LEAST_ROWS", 4)
        patch.setattr(select, "_SAMPLE_ELEMENTS", 12)
        yield


def assert_kept(value: StatisticValue, delta: Single, k: int, tops: list[int]) -> None:
    """All tiles, each trimmed by its own cut, against the naive rule."""
    kept = [
        trim(delta[None, tile.start : tile.stop].copy(), value.at(index))[0]
        for index, tile in enumerate(cut_rows(len(delta), *tops))
    ]
    expected = keep_largest(delta, (k + 0.5) / delta.size).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(kept), expected)


@THOROUGH
@given(tensors(), st.data(), st.lists(st.integers(0, 12), max_size=5))
def test_a_sampled_bracket_is_exact(delta: Single, data: st.DataObject, tops: list[int]) -> None:
    k = data.draw(st.integers(1, delta.size))
    knobs = Knobs({"density": np.array([min(1.0, (k + 0.5) / delta.size)])}, {}, 1, (0,))
    spec = TensorSpec("w", delta.shape, DType.F32)
    first = KthMagnitude(keep="density").start(spec, knobs, {}, 0)
    value, _ = fold_over(first, [delta], cut_rows(len(delta), *tops))
    assert_kept(value, delta, k, tops)


@THOROUGH
@given(
    tensors(),
    st.data(),
    st.lists(st.integers(0, 12), max_size=5),
    st.sampled_from([150, 400, 1 << 20]),
)
def test_any_bracket_is_exact(
    delta: Single, data: st.DataObject, tops: list[int], state_bytes: int
) -> None:
    k = data.draw(st.integers(1, delta.size))
    edges = sorted({1, ABOVE_ALL, *(int(key) for key in keys(delta).reshape(-1) if key > 0)})
    low = data.draw(st.sampled_from(edges[:-1]))
    high = data.draw(st.sampled_from([edge for edge in edges if edge > low]))
    spec = TensorSpec("w", delta.shape, DType.F32)
    pending = {0: Bracket(k, low, high)}
    fold = Counting(Subject(spec, each_model), pending, Thresholds(1), state_bytes)
    value, _ = fold_over(fold, [delta], cut_rows(len(delta), *tops))
    assert_kept(value, delta, k, tops)
