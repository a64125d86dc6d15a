"""Random numbers of elements: the kernel equals the reference, and the masks are random."""

from __future__ import annotations

import numpy as np
import pytest

from streammerge.kernels import drop, drop_by_rank
from streammerge.noise import Draws, key_of, limit_of, uniform
from tests.oracles.dense import Exact, Mask
from tests.oracles.pruning import number, probabilities

SIZE = 1 << 16
# Six standard deviations of a mean of so many: a fair mask goes beyond it once in 10^9 tests.
FAR = 6 / SIZE**0.5


def mask(share: float, seed: int = 0, tensor: str = "w", model: int = 0) -> Mask:
    """Which elements of a tensor of ones stay."""
    ones = np.ones((1, 64, SIZE // 64), np.float32)
    kept = drop(ones, np.array([share]), Draws((key_of(seed, tensor, model),), 0))
    return np.asarray(kept.reshape(-1) == 1)


def correlation(one: Mask, other: Mask) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def test_numbers_are_those_of_plain_python() -> None:
    found = uniform(key_of(7, "model.up.weight", 3), 5, 200)
    assert found.tolist() == [number(7, "model.up.weight", 3, i) for i in range(5, 205)]


@pytest.mark.parametrize("share", [1e-12, 0.1, 1 / 3, 0.5, 0.9999999, 1 - 2.0**-53])
def test_the_kernel_keeps_what_the_numbers_say(share: float) -> None:
    expected = uniform(key_of(0, "w", 0), 0, SIZE) < share
    np.testing.assert_array_equal(mask(share), expected)


def test_the_kernel_goes_on_at_any_index() -> None:
    whole, key = mask(0.4), key_of(0, "w", 0)
    for first, stop in ((0, 1), (1, 1000), (1000, SIZE)):
        part = np.ones((1, 1, stop - first), np.float32)
        kept = drop(part, np.array([0.4]), Draws((key,), first)).reshape(-1) == 1
        np.testing.assert_array_equal(kept, whole[first:stop])


def test_indices_beyond_32_bits_have_numbers_of_their_own() -> None:
    key = key_of(0, "w", 0)
    near, far = uniform(key, 0, 1000), uniform(key, 1 << 32, 1000)
    assert not np.any(near == far)
    assert far[10] == number(0, "w", 0, (1 << 32) + 10)


def test_a_limit_is_exact() -> None:
    for share in (0.0, 2.0**-53, 0.3, 1 - 2.0**-53):
        limit = limit_of(share)
        assert (limit - 1) * 2.0**-53 < share <= limit * 2.0**-53 or share == limit == 0


@pytest.mark.parametrize("share", [0.05, 0.5, 0.83])
def test_the_kept_fraction_is_the_share(share: float) -> None:
    for seed in range(4):
        assert abs(np.mean(mask(share, seed)) - share) < FAR * (share * (1 - share)) ** 0.5


def test_scaled_by_the_share_a_tensor_is_kept_in_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=256)
    seeds = 2000
    total = np.zeros(256)
    for seed in range(seeds):
        total += np.where(uniform(key_of(seed, "w", 0), 0, 256) < 0.3, values / 0.3, 0)
    error = np.abs(total / seeds - values)
    assert np.all(error < 6 * np.abs(values) * (0.7 / 0.3 / seeds) ** 0.5)


@pytest.mark.parametrize(
    "other",
    [{"tensor": "v"}, {"tensor": "w0"}, {"model": 1}, {"model": 256}, {"seed": 1}, {"seed": 2**32}],
)
def test_masks_of_others_are_independent(other: dict[str, int]) -> None:
    assert abs(correlation(mask(0.5), mask(0.5, **other))) < FAR


def test_elements_are_independent_of_their_neighbours() -> None:
    kept = mask(0.5)
    for lag in (1, 2, 64, 1024, 4096):
        assert abs(correlation(kept[:-lag], kept[lag:])) < 2 * FAR


def test_a_mask_by_rank_keeps_as_often_as_its_probabilities_say() -> None:
    rows = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
    share: Exact = probabilities(rows, 0.5, 0.3)
    seeds, kept = 2000, np.zeros(rows.shape)
    for seed in range(seeds):
        draws = Draws((key_of(seed, "w", 0),), 0)
        left = drop_by_rank(
            rows[None].copy(), np.array([0.5]), np.array([0.3]), draws, divide=False
        )
        kept += left[0] != 0
    assert np.all(np.abs(kept / seeds - share) < 6 * (share * (1 - share) / seeds) ** 0.5)
    assert abs(np.mean(kept / seeds) - 0.5) < 6 * (0.25 / seeds / rows.size) ** 0.5


def test_ranks_of_equals_go_by_column() -> None:
    rows = np.array([[[2, -1, 1, -2, 1]]], np.float32)
    share = probabilities(rows[0], 0.5, 0.4)
    assert np.argsort(share[0]).tolist() == [1, 2, 4, 0, 3]
    left = drop_by_rank(
        np.repeat(rows, 1, axis=0), np.array([0.5]), np.array([0.4]), Draws((0,), 0), divide=True
    )
    numbers = uniform(0, 0, 5)
    expected = np.where(numbers < share[0], rows[0, 0] / share[0], 0)
    np.testing.assert_allclose(left[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("cols", [1, 2, 2047, 5000])
@pytest.mark.parametrize("divide", [False, True])
def test_drop_by_rank_is_its_formula_to_the_bit(cols: int, divide: bool) -> None:
    """Of magnitudes of every size, which differ in any digit of their bits."""
    rng = np.random.default_rng(cols)
    rows = rng.integers(0, 0x7F800000, (3, cols)).astype(np.uint32).view(np.float32)
    rows *= rng.choice([-1, 1], rows.shape).astype(np.float32)
    rows[1, ::3] = rows[1, 0]
    rows[2, ::2] = 0
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1)
    low, high = 0.5 - 0.4, 0.5 + 0.4
    share = low + (high - low) * ranks / (cols - 1) if cols > 1 else np.full((3, 1), 0.5)
    numbers = uniform(9, 7 * cols, rows.size).reshape(rows.shape)
    with np.errstate(over="ignore"):
        scaled = (rows / share).astype(np.float32) if divide else rows
    expected = np.where(numbers < share, scaled, np.float32(0))
    shares = np.array([0.5]), np.array([0.4])
    left = drop_by_rank(rows[None].copy(), *shares, Draws((9,), 7 * cols), divide=divide)
    assert left[0].tobytes() == expected.tobytes()
