"""The hot loops against numpy and plain Python."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streammerge.kernels import Cut, elect, multiply, narrow, trim, widen
from streammerge.kernels.casts import not_finite, not_finite_stored
from streammerge.kernels.contributions import (
    count_contributions,
    merge_contributions,
    variance,
)
from streammerge.kernels.norms import norms_of_rows, squares_of_columns
from streammerge.kernels.product import gram, squared_norms
from streammerge.kernels.prune import (
    ABOVE_ALL,
    KEEP_ALL_EQUAL,
    count_and_collect,
    count_below,
    keys,
)
from streammerge.kernels.vote import Divisor, Vote
from streammerge.kernels.weighted import (
    add_scaled,
    sum_of_squared_differences,
    sum_of_squares,
)
from streammerge.scratch import Scratch
from streammerge.words import DType
from tests.oracles.dense import rounded

Single = NDArray[np.float32]

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
SPECIAL = np.array(
    [
        *(0.0, -0.0, np.inf, -np.inf),
        *(
            2.0**-149,
            -(2.0**-149),
            2.0**-126,
            2.0**-133,
            2.0**-134,
            3 * 2.0**-135,
        ),  # bfloat16's least
        *(
            2.0**-24,
            2.0**-25,
            3 * 2.0**-26,
            65504,
            65519.996,
            65520,
        ),  # float16's least and greatest
        *(1e38, 3.4028235e38, 3.3895314e38, 3.3961775e38),  # bfloat16's greatest
        *(1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11),  # halfway
    ],
    np.float32,
)


def widened(raw: NDArray[np.generic], dtype: DType) -> Single:
    out = np.full((1, raw.size), np.nan, np.float32)
    widen(raw.view(np.uint8), dtype, out)
    return out.reshape(-1)


def narrowed(values: Single, dtype: DType) -> tuple[NDArray[np.uint8], int]:
    out = np.zeros(values.size * dtype.itemsize, np.uint8)
    return out, narrow(values.reshape(1, -1), dtype, out)


# ------------------------------------------------------------------------------------------ casts


def test_every_bfloat16_pattern_widens_to_its_value() -> None:
    """A bfloat16 is the upper half of a float32."""
    expected = np.array([struct.unpack(">f", struct.pack(">HH", int(p), 0))[0] for p in PATTERNS])
    got = widened(PATTERNS, DType.BF16)
    nan = np.isnan(expected)
    assert (got[~nan].view(np.uint32) == expected[~nan].astype(np.float32).view(np.uint32)).all()
    assert (got[nan].view(np.uint32) >> 16 == PATTERNS[nan]).all()


def test_every_float16_pattern_widens_to_its_value() -> None:
    expected = np.array([struct.unpack("<e", struct.pack("<H", int(p)))[0] for p in PATTERNS])
    got = widened(PATTERNS, DType.F16)
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert (np.signbit(got) == np.signbit(expected)).all()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_every_pattern_comes_back(dtype: DType) -> None:
    stored, bad = narrowed(widened(PATTERNS, dtype), dtype)
    exponent = 0x7F80 if dtype is DType.BF16 else 0x7C00
    nan = ((PATTERNS & exponent) == exponent) & ((PATTERNS & ~np.uint16(exponent | 0x8000)) != 0)
    back = stored.view(np.uint16)
    assert (back[~nan] == PATTERNS[~nan]).all()
    assert np.isnan(widened(back, dtype)[nan]).all()
    assert bad == int(np.sum((PATTERNS & exponent) == exponent))


def assert_nearest_even(values: Single, dtype: DType) -> None:
    stored, bad = narrowed(values, dtype)
    got = widened(stored.view(np.uint16), dtype).astype(np.float64)
    expected = rounded(values.astype(np.float64), dtype.label)
    np.testing.assert_array_equal(got, expected)
    assert (np.signbit(got) == np.signbit(values)).all()
    assert bad == np.sum(~np.isfinite(expected))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_narrowing_rounds_to_nearest_even(dtype: DType) -> None:
    """Every stored value, the midpoints between neighbours, and the floats beside those."""
    assert_nearest_even(np.concatenate([SPECIAL, -SPECIAL]), dtype)
    finite = widened(PATTERNS, dtype)
    finite = np.unique(finite[np.isfinite(finite)])
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    assert (finite[:-1] <= middle).all() and (middle <= finite[1:]).all()
    for beside in (middle, np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)):
        assert_nearest_even(beside.astype(np.float32), dtype)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60))
def test_narrowing_any_float(values: list[float]) -> None:
    for dtype in (DType.BF16, DType.F16):
        assert_nearest_even(np.array(values, np.float32), dtype)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_a_nan_stays_one_and_is_counted(dtype: DType) -> None:
    """Those with payload only in the low bits too, which rounding could turn into an infinity."""
    bits = np.array([0x7FC00000, 0x7F800001, 0xFF800001, 0xFFFFFFFF, 0x7F80FFFF], np.uint32)
    stored, bad = narrowed(bits.view(np.float32), dtype)
    carrier = {DType.BF16: np.uint16, DType.F16: np.float16, DType.F32: np.float32}
    assert np.isnan(widened(stored.view(carrier.get(dtype, np.float64)), dtype)).all()
    assert bad == len(bits)


def test_wide_types_keep_every_float32() -> None:
    values = np.concatenate([SPECIAL, -SPECIAL])
    for dtype, carrier in ((DType.F32, np.float32), (DType.F64, np.float64)):
        stored, bad = narrowed(values, dtype)
        assert stored.view(carrier).astype(np.float32).tobytes() == values.tobytes()
        assert bad == np.sum(~np.isfinite(values))


def test_float64_is_rounded_to_float32() -> None:
    values = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e300, -1e300, 1e-300, 0.1])
    expected = rounded(values, "F32")
    np.testing.assert_array_equal(widened(values, DType.F64).astype(np.float64), expected)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_widening_takes_odd_offsets_and_read_only_bytes(dtype: DType) -> None:
    """As a mapped file gives them."""
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    stored, _ = narrowed(values, dtype)
    shifted = np.frombuffer(b"x" + stored.tobytes(), np.uint8)[1:]
    out = np.empty((5, 10), np.float32)
    widen(shifted, dtype, out)
    straight = np.empty((5, 10), np.float32)
    widen(stored, dtype, straight)
    assert out.tobytes() == straight.tobytes()


def test_not_finite_counts_nan_and_both_infinities() -> None:
    rows = np.array([[1, np.nan, np.inf], [-np.inf, 0, 3.4e38]], np.float32)
    assert not_finite(rows) == 3


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
def test_stored_values_that_are_not_finite_are_counted(dtype: DType) -> None:
    """All bit patterns of the highest two bytes, held to what Python says of the value."""
    stored = np.zeros((1 << 16, dtype.itemsize), np.uint8)
    stored[:, -2:] = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    form = {DType.F16: "<e", DType.F64: "<d"}.get(dtype, "<f")
    low = bytes(2) if dtype is DType.BF16 else b""
    values = [struct.unpack(form, low + row.tobytes())[0] for row in stored]
    expected = sum(not math.isfinite(value) for value in values)
    assert expected > 10
    assert not_finite_stored(stored.reshape(-1), dtype) == expected


# ------------------------------------------------------------------------------------ pruning

# Few values, so that many are equal; both zeros, denormals and the extremes.
MAGNITUDES = st.sampled_from([0.0, 2.0**-149, 2.0**-148, 0.5, 0.5000001, 1.0, 3.4028235e38])
VALUES = st.tuples(MAGNITUDES, st.booleans()).map(lambda pair: pair[0] if pair[1] else -pair[0])
ROWS = st.lists(VALUES, min_size=1, max_size=40).map(lambda v: np.array([v], np.float32))


def key_of(magnitude: float) -> int:
    return int(keys(np.array([magnitude], np.float32))[0])


def test_keys_order_magnitudes() -> None:
    magnitudes = np.abs(np.concatenate([SPECIAL, np.random.default_rng(0).normal(size=99)]))
    ordered = np.sort(magnitudes.astype(np.float32))
    for signed in (ordered, -ordered):
        assert (np.diff(keys(signed).astype(np.int64)) >= 0).all()
    assert keys(np.array([np.nan], np.float32))[0] < ABOVE_ALL


@given(ROWS, MAGNITUDES, MAGNITUDES)
def test_count_and_collect(rows: Single, one: float, other: float) -> None:
    low, high = (key_of(value) for value in sorted((one, other)))
    for top in (high, high + 1, ABOVE_ALL):
        above, inside = count_and_collect(rows, low, top, Scratch())
        found = keys(rows).reshape(-1)
        assert above == np.sum(found >= top)
        assert inside.tolist() == [key for key in found.tolist() if low <= key < top]


def test_collecting_everything_fits_its_buffer() -> None:
    rows = np.ones((3, 1000), np.float32)
    above, inside = count_and_collect(rows, 1, ABOVE_ALL, Scratch())
    assert (above, inside.size) == (0, 3000)


@given(ROWS, MAGNITUDES)
def test_count_below(rows: Single, magnitude: float) -> None:
    found = keys(rows).reshape(-1)
    for key in (key_of(magnitude), key_of(magnitude) + 1, ABOVE_ALL):
        assert count_below(found, key) == np.sum(found < key)


def expected_trim(values: Sequence[float], threshold: float, quota: int) -> list[float]:
    """Element by element: larger ones stay, and of equal ones the first few."""
    kept = []
    for value in values:
        equal = abs(value) == threshold
        stays = abs(value) > threshold or (equal and quota > 0)
        quota -= equal
        kept.append(value if stays else 0.0)
    return kept


@given(ROWS, MAGNITUDES, st.integers(0, 12) | st.just(KEEP_ALL_EQUAL))
def test_trim(rows: Single, threshold: float, quota: int) -> None:
    expected = expected_trim(rows[0].tolist(), float(np.float32(threshold)), quota)
    key = key_of(threshold)
    trimmed = trim(rows[None].copy(), Cut((key,), (quota,)))
    np.testing.assert_array_equal(trimmed[0, 0], np.array(expected, np.float32))


def test_trim_takes_each_model_by_its_own_cut_in_place() -> None:
    deltas = np.arange(-6, 6, dtype=np.float32).reshape(2, 2, 3)
    cuts = Cut((key_of(5), 0), (1, KEEP_ALL_EQUAL))
    before = deltas[1].copy()
    assert trim(deltas, cuts) is deltas
    assert deltas[0].tolist() == [[-6, -5, 0], [0, 0, 0]]
    assert (deltas[1] == before).all()


# --------------------------------------------------------------------------------------- votes


def expected_vote(
    values: Sequence[float], weights: Sequence[float], mode: str, divide: str, scale: float
) -> float:
    """One element of `elect`, in float32 and in the order of the models."""
    one = np.float32
    terms = [one(w) * one(v) for w, v in zip(weights, values, strict=True)]
    votes = {"weighted": terms, "unweighted": values, "count": np.sign(terms)}[mode]
    vote = one(0)
    for each in votes:
        vote = one(vote + one(each))
    total, divisor = one(0), one(0)
    for value, term, weight in zip(values, terms, weights, strict=True):
        side = value if mode == "unweighted" else term
        if side > 0 if vote >= 0 else side < 0:
            share = 1.0 if divide == "count" else weight
            total, divisor = one(total + term), one(divisor + one(share))
    if divide != "none":
        total = one(total / (one(1) if abs(divisor) < one(1e-8) else divisor))
    return float(one(scale) * total)


@settings(max_examples=200)
@given(
    st.data(),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from(get_args(Vote)),
    st.sampled_from(get_args(Divisor)),
)
def test_elect_is_its_formula_to_the_bit(
    data: st.DataObject, models: int, size: int, vote: Vote, divide: Divisor
) -> None:
    number = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, -0.3, 0.7, 1e-20, -2.5])
    deltas = np.array(data.draw(st.lists(number, min_size=models * size, max_size=models * size)))
    deltas = deltas.reshape(models, 1, size).astype(np.float32)
    # Whose sums are exact, so that nothing depends on the precision of the divisor.
    share = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.125, -0.375, 0.75, -2.5])
    weights = np.array(data.draw(st.lists(share, min_size=models, max_size=models)))
    scale = data.draw(st.sampled_from([1.0, -0.5, 0.3]))
    expected = [
        expected_vote(deltas[:, 0, i].tolist(), weights.tolist(), vote, divide, scale)
        for i in range(size)
    ]
    merged = elect(deltas.copy(), weights, vote=vote, divide=divide, scale=scale)
    np.testing.assert_array_equal(merged, np.array([expected], np.float32))


def test_elect_works_across_its_blocks() -> None:
    """Longer than a block, and not a multiple of one."""
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(3, 7, 311)).astype(np.float32)
    weights = np.array([0.5, -1.0, 0.25])
    whole = elect(deltas.copy(), weights)
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        part = elect(deltas[:, start:stop].copy(), weights)
        assert part.tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ((3, -3), (1, 1), 3),  # a vote of zero counts as plus
        ((-3, 0), (1, 1), -3),  # zeros never agree
        ((0, 0), (1, 1), 0),
        ((-2, -4), (1, -1), -4),  # the sign of w d, and the mean of d
        ((5, 5), (0, 1), 5),  # a weight of zero is a value
        ((2, 2), (1, 3), 2),
        ((8, -1, -1), (1, 1, 1), 8),
    ],
)
def test_elections(values: Sequence[float], weights: Sequence[float], expected: float) -> None:
    deltas = np.array(values, np.float32).reshape(-1, 1, 1)
    assert elect(deltas, np.array(weights))[0, 0] == expected


@pytest.mark.parametrize("weights", [(0.1, 0.2, -0.3), (0.3, 0.6, -0.9), (0.15, 0.55, -0.7)])
def test_weights_that_sum_to_nothing_divide_by_one(weights: tuple[float, ...]) -> None:
    """As decimals they do; their float32 values miss that by up to 3e-8, more than 1e-8."""
    deltas = np.array([1, 1, -1], np.float32).reshape(-1, 1, 1)
    merged = elect(deltas, np.array(weights))
    assert merged[0, 0] == pytest.approx(sum(abs(w) for w in weights), rel=1e-6)


# ---------------------------------------------------------------------- all models of an element


@pytest.fixture
def stack() -> Single:
    """Longer than two blocks, with elements that none, one or several models have."""
    rng = np.random.default_rng(4)
    deltas = rng.normal(size=(3, 5, 511)).astype(np.float32)
    deltas[rng.random(deltas.shape) < 0.4] = 0
    return deltas


@pytest.mark.parametrize("models", [3, 5])
def test_variance_is_its_formula_to_the_bit(stack: Single, models: int) -> None:
    mean = np.zeros(stack.shape[1:])
    for delta in stack:
        mean += delta
    mean /= models
    total = (models - 3) * mean * mean
    for delta in stack:
        total += (delta - mean) ** 2
    expected = (total / models).astype(np.float32)
    assert variance(stack, models).tobytes() == expected.tobytes()


def test_contributions_are_counted_as_shared_or_alone(stack: Single) -> None:
    above = np.abs(stack) > np.float32(0.5)
    together = above & (above.sum(axis=0) > 1)
    shared, alone = count_contributions(stack, 0.5)
    assert shared.tolist() == together.sum(axis=(1, 2)).tolist()
    assert alone.tolist() == (above & ~together).sum(axis=(1, 2)).tolist()


def test_contributions_are_merged_by_their_formula_to_the_bit(stack: Single) -> None:
    factors = np.array([0.5, 1 / 3, -2.0])
    above = np.abs(stack) > np.float32(0.5)
    there = above.sum(axis=0)
    total = np.zeros(stack.shape[1:], np.float32)
    for delta, counts in zip(stack, above, strict=True):
        total = np.where(counts, total + delta, total)
    own = np.array(factors, np.float32)[np.argmax(above, axis=0)]
    mean = total / np.maximum(there, 1).astype(np.float32)
    expected = np.where(there == 1, total * own, mean)
    assert merge_contributions(stack.copy(), 0.5, factors).tobytes() == expected.tobytes()


# ----------------------------------------------------------------------------- sums and products


@pytest.fixture
def pair() -> tuple[Single, Single]:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 9, 31)).astype(np.float32)
    return one, other


def test_add_scaled_is_one_rounding_each(pair: tuple[Single, Single]) -> None:
    out, rows = pair
    factor = 1 / 3
    expected = out + np.float32(factor) * rows
    add_scaled(out, factor, rows)
    assert out.tobytes() == expected.tobytes()


def test_norms(pair: tuple[Single, Single]) -> None:
    one, other = (array.astype(np.float64) for array in pair)
    assert sum_of_squares(pair[0]) == pytest.approx(np.sum(one**2), rel=1e-12)
    difference = sum_of_squared_differences(*pair)
    assert difference == pytest.approx(np.sum((one - other) ** 2), rel=1e-12)
    huge = np.full((2, 3), 1e30, np.float32)  # its squares overflow float32
    assert sum_of_squares(huge) == pytest.approx(6e60, rel=1e-6)


def test_norms_of_products_need_no_product() -> None:
    rng = np.random.default_rng(1)
    ranks, scales = (3, 1, 4), [0.5, -2.0, 1 / 3]
    lefts = [rng.normal(size=(20, rank)).astype(np.float32) for rank in ranks]
    rights = [rng.normal(size=(rank, 5000)).astype(np.float32) for rank in ranks]
    norms = squared_norms(np.hstack(lefts), [gram(right) for right in rights], scales)
    for norm, left, right, scale in zip(norms, lefts, rights, scales, strict=True):
        product = scale * (left.astype(np.float64) @ right.astype(np.float64))
        assert math.isclose(norm, float(np.sum(product**2)), rel_tol=1e-5)


def test_multiply_writes_the_product() -> None:
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(7, 3)), rng.normal(size=(3, 11))
    out = np.full((7, 11), np.nan, np.float32)
    multiply(left.astype(np.float32), right.astype(np.float32), out)
    np.testing.assert_allclose(out, left @ right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cols", [1, 3, 4, 7, 64, 129])
def test_squares_of_rows_and_columns(cols: int) -> None:
    random = np.random.default_rng(cols)
    rows, added = random.normal(size=(2, 5, cols)).astype(np.float32)
    summed = (rows + added).astype(np.float64)
    np.testing.assert_allclose(norms_of_rows(rows, added), np.linalg.norm(summed, axis=1), 1e-14)
    exact = np.sum(rows.astype(np.float64) ** 2, axis=0)
    np.testing.assert_allclose(squares_of_columns(rows), exact, 1e-14)
